"""What is shown of a conversion while it runs: the table on a terminal, the lines elsewhere, and that neither harms."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program import CLI, TIMEOUT_SECONDS
from rich.console import Console

from slicecast.convert.progress import HostProgress, ProgressDisplay, line, table
from slicecast.convert.run_log import Event

GB = 10**9
BUDGET = 16 * GB

# A clock of the hosts, and the one of who shows it.
BEGAN = 1_790_000_000.0
NOW = 1000.0


def begin(process: int = 0, name: str = "machine") -> Event:
    return {"event": "begin", "process": process, "time": BEGAN, "host": name, "rss_bytes": GB}


def wave(seconds: float, *, process: int = 0, resumed: bool = False, rss_gb: float = 2) -> Event:
    """A wave of 1 GB in and 4 GB out that ended so long after the start, or one that an earlier run had finished."""
    return {
        "event": "wave",
        "process": process,
        "time": BEGAN + seconds,
        "resumed": resumed,
        "done_bytes": 4 * GB,
        "in_bytes": 0 if resumed else GB,
        "written_bytes": 0 if resumed else 4 * GB,
        "seconds": {} if resumed else {"read": 6.0, "compute": 1.0, "write": 3.0},
        "rss_bytes": round(rss_gb * GB),
    }


def end(error: str | None, process: int = 0) -> Event:
    return {"event": "end", "process": process, "time": BEGAN + 100, "error": error}


def host(process: int, waves: int, *, of: int = 10, rss_gb: float = 2, name: str | None = None) -> HostProgress:
    """A host that has written so many waves, one in 10 seconds."""
    state = HostProgress(process, of, of * 4 * GB, heard=NOW)
    for event in [
        begin(process, f"t1v-n-0123abcd-w-{process}" if name is None else name),
        *(wave(10.0 * (number + 1), process=process, rss_gb=rss_gb) for number in range(waves)),
    ]:
        state = state.after(event, NOW)
    return state


def drawn(hosts: Sequence[HostProgress], width: int = 80, now: float = NOW) -> list[str]:
    """The lines of the table, without colors."""
    text = io.StringIO()
    Console(file=text, width=width).print(table(hosts, BUDGET, now, width))
    return [one.rstrip() for one in text.getvalue().splitlines()]


def colored(hosts: Sequence[HostProgress], now: float = NOW) -> str:
    text = io.StringIO()
    Console(file=text, width=80, force_terminal=True, color_system="standard").print(table(hosts, BUDGET, now, 80))
    return text.getvalue()


# ---- The table


def test_one_host_at_80_columns() -> None:
    assert drawn([host(0, 4)]) == [
        "                                 read  write       % of time in    memory   time",
        "host          done               GB/s   GB/s  read/device/write  of 16 GB   left",
        "0 t1v-n-012…  ━━━━         40 %  0.10   0.40         60/ 10/ 30    2.0 GB  1m00s",
    ]


def test_several_hosts_at_120_columns() -> None:
    hosts = [host(0, 5), replace(host(1, 2), error="ReadError: gone"), HostProgress(2, 10, 40 * GB, NOW - 125)]
    assert drawn(hosts, 120) == [
        "                                                      read  write       % of time in    memory   time",
        "host                  done                            GB/s   GB/s  read/device/write  of 16 GB   left",
        "0 t1v-n-0123abcd-w-0  ━━━━━━━━━━━━              50 %  0.10   0.40         60/ 10/ 30    2.0 GB  0m50s",
        "1 t1v-n-0123abcd-w-1  ━━━━╸                     20 %  0.10   0.40         60/ 10/ 30    2.0 GB  1m20s",
        "2                                                0 %  0.00   0.00                  ?         ?      ?",
        "all 3                 ━━━━━╸                    23 %  0.20   0.80         60/ 10/ 30    2.0 GB      ?",
        "host 1 (t1v-n-0123abcd-w-1) failed: ReadError: gone",
        "no wave of host 2 for 2m05s",
    ]


def test_several_hosts_at_80_columns() -> None:
    assert drawn([host(0, 10), host(1, 2, rss_gb=14), HostProgress(2, 10, 40 * GB, NOW)]) == [
        "                                 read  write       % of time in    memory   time",
        "host          done               GB/s   GB/s  read/device/write  of 16 GB   left",
        "0 t1v-n-012…  ━━━━━━━━━━  100 %  0.10   0.40         60/ 10/ 30    2.0 GB   done",
        "1 t1v-n-012…  ━━           20 %  0.10   0.40         60/ 10/ 30   14.0 GB  1m20s",
        "2                           0 %  0.00   0.00                  ?         ?      ?",
        "all 3         ━━━━         40 %  0.20   0.80         60/ 10/ 30   14.0 GB      ?",
    ]


def test_of_many_hosts_the_slowest_and_the_fastest_are_shown() -> None:
    """And it fits into a terminal of 24 lines."""
    lines = drawn([host(process, 1 + process * 7 % 64, of=64) for process in range(64)])
    assert len(lines) <= 23
    shown = [int(one.split()[0]) for one in lines[2:-1] if not one.startswith("...")]
    slowest = sorted(range(64), key=lambda process: process * 7 % 64)
    assert shown == [*slowest[:14], slowest[-1]]
    assert lines[-3].startswith("... 49 more")
    assert re.match(r"all 64 +━+╸? +50 % ", lines[-1])


def test_sixteen_hosts_are_all_shown() -> None:
    lines = drawn([host(process, 5) for process in range(16)])
    assert [one.split()[0] for one in lines[2:]] == [*map(str, range(16)), "all"]


@pytest.mark.parametrize(("rss_gb", "code"), [(12.8, None), (12.9, "33"), (15.2, "33"), (15.3, "1;31")])
def test_memory_near_the_budget_is_colored(rss_gb: float, code: str | None) -> None:
    last = colored([host(0, 4, rss_gb=rss_gb)]).splitlines()[-1]
    cell = re.search(rf"(?:\x1b\[([\d;]+)m)?\s*{rss_gb} GB", last)
    assert cell is not None
    assert cell[1] == code


def test_the_bottleneck_stands_out() -> None:
    assert "\x1b[1;36m 60\x1b[0m/ 10/ 30" in colored([host(0, 4)])


@pytest.mark.parametrize(("silent", "marked"), [(59.9, False), (60.0, True)])
def test_a_host_that_is_silent_is_marked(silent: float, marked: bool) -> None:
    hosts = [replace(host(0, 4), heard=NOW + silent), host(1, 4)]
    remark = "no wave of host 1 (t1v-n-0123abcd-w-1) for 1m00s"
    assert (drawn(hosts, now=NOW + silent)[-1] == remark) == marked
    assert ("\x1b[33m1 t1v" in colored(hosts, NOW + silent)) == marked
    assert line(hosts, 0, BUDGET, NOW + silent).endswith(f"  {remark}") == marked


def test_of_several_silent_hosts_the_longest_is_named() -> None:
    hosts = [replace(host(process, 4), heard=NOW - 100 * process) for process in range(4)]
    assert drawn(hosts)[-1] == "no wave of host 3 (t1v-n-0123abcd-w-3) for 5m00s, and of 2 more"


def test_a_host_that_is_done_may_be_silent() -> None:
    assert drawn([host(0, 4), replace(host(1, 10), heard=0.0)])[-1].startswith("all 2")


def test_a_host_that_failed_is_named() -> None:
    failed = host(1, 4).after(end("ReadError: model.safetensors: made to fail\nand more", 1), NOW)
    lines = drawn([host(0, 4), failed], now=NOW + 1)
    assert lines[-1] == "host 1 (t1v-n-0123abcd-w-1) failed: ReadError: model.safetensors: made to fail"


def test_a_host_without_work_is_done() -> None:
    idle = HostProgress(1, 0, 0, NOW).after(begin(1), NOW)
    assert (idle.part, idle.seconds_left) == (1.0, 0.0)
    assert "100 %" in drawn([host(0, 4), idle])[3]


def test_part_is_rounded_down() -> None:
    """100 % is said only when all is done."""
    assert " 99 %" in drawn([host(0, 399, of=400)])[2]


def test_a_clock_of_a_host_that_is_set_back() -> None:
    state = HostProgress(0, 10, 40 * GB, NOW).after(begin(), NOW).after(wave(-3600), NOW)
    assert (state.rate(GB), state.seconds_left) == (0.0, None)
    assert drawn([state])[-1].endswith("?")


# ---- The lines


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """The time."""
        return self.now


class Display:
    """A display of a host with 10 waves of 1 GB in and 4 GB out each, and of others, that writes into a string."""

    def __init__(self, *, terminal: bool = False, hosts: int = 1, waves: int = 10):
        self.clock, self.text = Clock(), io.StringIO()
        self.display = ProgressDisplay(
            Console(file=self.text, force_terminal=terminal, width=80),
            [HostProgress(process, waves, waves * 4 * GB) for process in range(hosts)],
            0,
            BUDGET,
            clock=self.clock,
            memory=lambda: 3 * GB,
        )
        self.display.add(begin())

    def report(self, seconds: float, *, process: int = 0, resumed: bool = False) -> list[str]:
        """Ends a wave so many seconds after the start; the lines that this adds."""
        before = len(self.text.getvalue())
        self.clock.now = NOW + seconds
        self.display.add(wave(seconds, process=process, resumed=resumed))
        self.display.show()
        return self.text.getvalue()[before:].splitlines()


def test_a_line_every_five_seconds_and_at_the_end() -> None:
    shown = Display()
    times = (1, 4.9, 5, 6, 9.9, 10.1, 15, 15.2, 15.3, 15.4)
    assert [len(shown.report(seconds)) for seconds in times] == [0, 0, 1, 0, 0, 1, 0, 1, 0, 1]


def test_what_a_line_says() -> None:
    """2 GB read and 8 GB written in 8 s; 32 GB are left, at 1 GB/s."""
    shown = Display()
    shown.report(1)
    assert shown.report(8) == [
        "wave 2/10  in 2.00 GB (0.25 GB/s)  out 8.00 GB (1.00 GB/s)  rss 3.00 GB (budget 16 GB)  left 0m32s"
    ]


def test_what_a_line_says_of_other_hosts() -> None:
    shown = Display(hosts=3)
    own = "host 0 of 3: wave 1/10  in 1.00 GB (0.17 GB/s)  out 4.00 GB (0.67 GB/s)  rss 3.00 GB (budget 16 GB)  "
    assert shown.report(6) == [f"{own}left 0m54s"]
    shown.display.add(begin(1))
    for seconds in (1, 2, 3):
        shown.display.add(wave(seconds, process=1))
    assert shown.report(11, process=2) == [f"{own}left 0m54s  hosts 10 to 30 % (slowest: host 0)"]


def test_lines_go_on_until_the_last_host_is_done() -> None:
    shown = Display(hosts=2, waves=1)
    shown.display.add(begin(1))
    (line,) = shown.report(1)
    assert line.endswith("left 0m00s  hosts 0 to 100 % (slowest: host 1)")
    shown.display.show()
    (line,) = shown.report(2, process=1)
    assert line.endswith("left 0m00s  all hosts are done")


@pytest.mark.parametrize(("seconds", "left"), [(6, "0m54s"), (30, "4m30s"), (400, "1h00m"), (4000, "10h00m")])
def test_the_time_that_is_left(seconds: float, left: str) -> None:
    """Nine waves after the first took so long."""
    (line,) = Display().report(seconds)
    assert line.endswith(f"left {left}")


def test_waves_of_an_earlier_run_do_not_count_as_speed() -> None:
    """Four waves are left, of 4 GB at half a GB a second."""
    shown = Display()
    for _ in range(5):
        shown.report(0.1, resumed=True)
    (line,) = shown.report(8)
    assert line.startswith("wave 6/10  in 1.00 GB (0.12 GB/s)  out 4.00 GB (0.50 GB/s)  ")
    assert line.endswith("left 0m32s")
    assert (shown.display.own.waves, shown.display.own.resumed) == (6, 5)


def test_nothing_is_known_before_anything_is_written() -> None:
    (line,) = Display().report(6, resumed=True)
    assert line.endswith("left ?")


def test_nothing_is_left_where_all_was_finished_before() -> None:
    (line,) = Display(waves=1).report(0.1, resumed=True)
    assert line.endswith("left 0m00s")


def test_a_quiet_console_shows_nothing() -> None:
    text = io.StringIO()
    console = Console(file=text, quiet=True, force_terminal=True)
    with ProgressDisplay(console, [HostProgress(0, 1, 4 * GB)], 0, BUDGET, clock=Clock()) as display:
        display.add(begin())
        display.add(wave(10))
        display.show()
    assert text.getvalue() == ""
    assert display.own.waves == 1


def test_events_from_many_threads() -> None:
    shown = Display(waves=400)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: shown.report(1, resumed=number % 4 == 0), range(400)))
    assert (shown.display.own.waves, shown.display.own.resumed) == (400, 100)
    (line,) = shown.text.getvalue().splitlines()
    assert "  in 300.00 GB (300.00 GB/s)  out 1200.00 GB (1200.00 GB/s)  " in line


# ---- On a terminal


def plain(text: str) -> str:
    """Text without what moves the cursor and colors."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def is_cursor_visible(text: str) -> bool:
    """Whether the cursor is visible after text that hides it or shows it."""
    return re.findall(r"\x1b\[\?25[lh]", text)[-1] == "\x1b[?25h"


def test_the_table_is_there_at_the_end() -> None:
    shown = Display(terminal=True)
    with shown.display:
        for number in range(10):
            shown.report(number + 1)
    *_, last = plain(shown.text.getvalue()).strip().splitlines()
    assert last.startswith("0 machine  ━")
    assert last.endswith("100 %  1.00   4.00         60/ 10/ 30    3.0 GB  done")


def test_a_terminal_without_a_movable_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = Display(terminal=True)
    with shown.display:
        (line,) = shown.report(6)
    assert line.startswith("wave 1/10")


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    """What is printed meanwhile stands above the table, what is printed later below; the cursor is never hidden."""
    streams = sys.stdout, sys.stderr
    shown = Display(terminal=True)

    def work() -> None:
        with shown.display:
            assert is_cursor_visible(shown.text.getvalue())
            shown.report(1)
            print("a warning", file=sys.stderr)
            raise OSError("made to fail")

    with pytest.raises(OSError, match="made to fail"):
        work()
    assert (sys.stdout, sys.stderr) == streams
    assert is_cursor_visible(shown.text.getvalue())
    lines = plain(shown.text.getvalue()).splitlines()
    assert lines.index("a warning") < len(lines) - 3
    assert lines[-1].startswith("0 machine  ━")
    assert shown.text.getvalue().endswith("\n\x1b[?25h")


# Fails after some reads, as if a disk did.
FAIL = """
from slicecast.convert import pipeline
from slicecast.convert.errors import ReadError
class Failing(pipeline.Reader):
    def read(self, wanted):
        if self.requests > 20:
            raise ReadError("model-00002-of-000003.safetensors: made to fail")
        return super().read(wanted)
pipeline.Reader = Failing
"""


def on_terminal(*arguments: object, prelude: str) -> tuple[int, str]:
    """Runs the command line on a terminal; its exit code, and what the terminal got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + CLI, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"},
    )
    os.close(theirs)
    got = b""
    with contextlib.suppress(OSError):  # Linux says so when the other end is closed.
        while data := os.read(ours, 1 << 16):
            got += data
    os.close(ours)
    return process.wait(TIMEOUT_SECONDS), got.decode(errors="replace")


def test_on_a_terminal(llama: Path, tmp_path: Path) -> None:
    """A run that fails, and one that goes on."""
    flags = (
        "convert",
        f"--hf_model_path={llama}",
        f"--base_output_directory={tmp_path / 'out'}",
        "--host_memory_gb=0.01",
    )
    code, text = on_terminal(*flags, prelude=FAIL)
    lines = plain(text).splitlines()
    assert code == 42
    assert lines[-1] == "slicecast: ReadError: model-00002-of-000003.safetensors: made to fail"
    assert re.match(r"0 \S+ +[━╸╺]+ +\d+ %", lines[-2])
    assert is_cursor_visible(text)
    code, text = on_terminal(*flags, prelude="")
    lines = plain(text).splitlines()
    assert code == 0
    assert re.match(r"0 \S+ +━+ +100 %", lines[-3])
    assert re.match(r"done in .*: [1-9]\d* waves written, [1-9]\d* had been", lines[-2])


# ---- What other hosts say


# Hears of others all the time.
OFTEN = """
from slicecast.convert import conversion, run_log
conversion.SECONDS_BETWEEN_PARTS = run_log.SECONDS_BETWEEN_PARTS = 0.05
"""

# Reading what they say does not work. The summary at the end, which is not for show, reads the logs of all runs.
DEAF = """
import sys, threading
new_events = run_log.LogReader.new_events
def failing(self, run=None):
    if run is None:
        return new_events(self)
    print("asked", file=sys.stderr)
    {fault}
run_log.LogReader.new_events = failing
"""


def test_the_others_are_heard_of(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = slicecast.run_processes(
        f"--hf_model_path={llama}", f"--base_output_directory={output}", "--host_memory_gb=0.01", prelude=OFTEN
    )
    lines = [line for line in done[0].stderr.splitlines() if line.startswith("host 0 of 2: wave ")]
    assert lines[-1].endswith("left 0m00s  all hosts are done")
    assert "wave " not in done[1].stderr


@pytest.mark.parametrize("fault", ["raise OSError('made to fail')", "return iter([{}])", "threading.Event().wait()"])
def test_failing_to_hear_of_them_stops_nothing(slicecast: Any, llama: Path, tmp_path: Path, fault: str) -> None:
    output = tmp_path / "out"
    done = slicecast.run_processes(
        f"--hf_model_path={llama}",
        f"--base_output_directory={output}",
        "--host_memory_gb=0.01",
        prelude=OFTEN + DEAF.format(fault=fault),
    )
    assert "asked" in done[0].stderr
    assert re.search(r"^host 0 of 2: wave (\d+)/\1 .* left 0m00s$", done[0].stderr, re.MULTILINE)
    assert "done in " in done[0].stderr
    slicecast.run("verify", output, f"--hf_model_path={llama}")
