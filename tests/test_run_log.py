"""The log of a run: in parts beside the checkpoint, and with `--log_json` as lines of JSON."""

import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from etils import epath

from slicecast.convert import commands
from slicecast.convert.errors import OutputError
from slicecast.convert.memory import Machine
from slicecast.convert.plan import Plan
from slicecast.convert.run_log import SECONDS_BETWEEN_PARTS, LogReader, RunLog
from slicecast.convert.settings import Settings

BUDGET_BYTES = 5_000_000


def log(directory: Path, run: str = "0123abcd", process: int = 0, **options: Any) -> RunLog:
    return RunLog(epath.Path(directory), run, process, options.pop("echo", lambda _: None), **options)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(reader: LogReader, run: str | None = None) -> list[int]:
    return [event["number"] for event in reader.new_events(run)]


def test_an_event(tmp_path: Path) -> None:
    """What is kept for the file is not shown; the rest is the same."""
    shown: list[Any] = []
    made = log(tmp_path / "log", process=3, echo=shown.append)
    made.add("wave", kept={"digests": {"key": "0f"}}, wave=7)
    made.flush()
    (record,) = records(tmp_path / "log" / "0123abcd-3-0.jsonl")
    assert record.pop("digests") == {"key": "0f"}
    assert shown == [record]
    assert record.pop("time") > 0
    assert record == {"event": "wave", "run": "0123abcd", "process": 3, "wave": 7}


def test_parts(tmp_path: Path) -> None:
    """A part is written when it is time to, never again, and never without an event."""
    clock = SimpleNamespace(now=1000.0)
    made = log(tmp_path, clock=lambda: clock.now)
    made.flush()
    made.add("wave", number=0)
    clock.now += SECONDS_BETWEEN_PARTS - 0.01
    made.add("wave", number=1)
    assert not list(tmp_path.iterdir())
    clock.now += 0.01
    made.add("wave", number=2)
    first = tmp_path / "0123abcd-0-0.jsonl"
    assert [record["number"] for record in records(first)] == [0, 1, 2]
    made.add("wave", number=3)
    assert list(tmp_path.iterdir()) == [first]
    first.unlink()
    made.flush()
    made.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["0123abcd-0-1.jsonl"]
    assert [record["number"] for record in records(tmp_path / "0123abcd-0-1.jsonl")] == [3]


def test_many_threads(tmp_path: Path) -> None:
    clock = itertools.count(step=SECONDS_BETWEEN_PARTS / 3)
    made = log(tmp_path, clock=lambda: float(next(clock)))

    def add(first: int) -> None:
        for number in range(first, first + 50):
            made.add("wave", number=number)

    threads = [threading.Thread(target=add, args=(50 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.flush()
    assert sorted(numbers(LogReader(epath.Path(tmp_path)))) == list(range(200))


def test_storage_that_fails(tmp_path: Path) -> None:
    """Nothing of it is lost, should storage come back."""
    (tmp_path / "log").write_text("in the way")
    made = log(tmp_path / "log")
    made.add("wave", number=0)
    with pytest.raises(OutputError, match=r"0123abcd-0-0.jsonl: cannot be written: .*Run the same command again"):
        made.flush()
    (tmp_path / "log").unlink()
    made.flush()
    assert numbers(LogReader(epath.Path(tmp_path / "log"))) == [0]


def test_each_part_is_read_once(tmp_path: Path) -> None:
    reader = LogReader(epath.Path(tmp_path / "log"))
    assert numbers(reader) == []
    made = log(tmp_path / "log")
    for number in range(3):
        made.add("wave", number=number)
        made.flush()
        assert numbers(reader) == [number]
        assert numbers(reader) == []


def test_the_events_of_one_run(tmp_path: Path) -> None:
    for number, (run, process) in enumerate([("aaaa", 0), ("aaaa", 1), ("bbbb", 0)]):
        made = log(tmp_path, run, process)
        made.add("wave", number=number)
        made.flush()
    assert numbers(LogReader(epath.Path(tmp_path)), "aaaa") == [0, 1]
    reader = LogReader(epath.Path(tmp_path))
    assert numbers(reader, "bbbb") == [2]
    assert numbers(reader) == [0, 1]  # A part that was passed over is not taken for read.


def test_the_order_of_parts(tmp_path: Path) -> None:
    """By their numbers: part 10 comes after part 9, and process 10 after process 9."""
    made = [log(tmp_path, process=process) for process in (0, 9, 10)]
    for number, (process, _) in enumerate(itertools.product(range(3), range(12))):
        made[process].add("wave", number=number)
        made[process].flush()
    assert numbers(LogReader(epath.Path(tmp_path))) == list(range(36))


@pytest.mark.parametrize("torn", ['{"number": 1', '{"number": 1, "text": "', "{", "\0\0\0"])
def test_a_part_that_ends_anywhere(tmp_path: Path, torn: str) -> None:
    (tmp_path / "aaaa-0-0.jsonl").write_text('{"number": 0}\n' + torn)
    (tmp_path / "aaaa-0-1.jsonl").write_text('{"number": 2}\n')
    assert numbers(LogReader(epath.Path(tmp_path))) == [0, 2]


def test_other_files(tmp_path: Path) -> None:
    for name in ("aaaa-0-0.jsonl.tmp", "aaaa-0.jsonl", "notes.txt", "aaaa-0-x.jsonl"):
        (tmp_path / name).write_text('{"number": 0}\n')
    assert numbers(LogReader(epath.Path(tmp_path))) == []


@pytest.fixture(scope="module")
def converted(
    module_slicecast: Any, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Path, list[list[Any]]]:
    """A conversion by two processes: its plan, its output, and the lines of each process's standard error, decoded."""
    output = tmp_path_factory.mktemp("logged") / "output"
    arguments = [f"--hf_model_path={llama}", f"--base_output_directory={output}"]
    done = module_slicecast.run_processes(*arguments, f"--host_memory_gb={BUDGET_BYTES / 1e9}", "--log_json")
    plan = commands.make_plan(Settings(hf_model_path=str(llama)), Machine(2, 4, BUDGET_BYTES, None))
    return plan, output, [[json.loads(line) for line in one.stderr.splitlines()] for one in done]


def test_lines_of_json(converted: Any) -> None:
    """From every process: which waves it has and what became of each; from the first one, the plan and the end."""
    plan, _, processes = converted
    assert [event["event"] for event in processes[0] if event["event"] != "wave"] == [
        *("plan", "begin", "end", "commit", "done"),
    ]
    assert [event["event"] for event in processes[1] if event["event"] != "wave"] == ["begin", "end", "commit"]
    for process, events in enumerate(processes):
        waves = [event for event in events if event["event"] == "wave"]
        expected = plan.waves[process]
        assert len(expected) > 1
        assert sorted(event["wave"] for event in waves) == list(range(len(expected)))
        for event in waves:
            wave = expected[event["wave"]]
            assert event["process"] == process
            assert not event["resumed"]
            assert event["in_bytes"] == wave.in_bytes
            assert event["written_bytes"] == event["done_bytes"] == wave.out_bytes
            assert event["seconds"].keys() == {"read", "compute", "write"}
            # JAX alone takes more. The system's two counts are not exact, so one may be above the other.
            assert event["rss_bytes"] > 50e6
            assert event["peak_rss_bytes"] > 50e6
            assert "digests" not in event
        (end,) = (event for event in events if event["event"] == "end")
        assert end["error"] is None
        assert end["requests"] >= len(expected)
    waves = [event for events in processes for event in events if event["event"] == "wave"]
    assert sum(event["in_bytes"] for event in waves) == plan.in_bytes
    assert sum(event["written_bytes"] for event in waves) == plan.out_bytes
    assert len({event["run"] for event in waves}) == 1


def test_the_log_beside_the_checkpoint(converted: Any) -> None:
    """The same events, with the digest of each chunk, and with what is converted how."""
    plan, output, processes = converted
    stored = list(LogReader(epath.Path(output / "slicecast-log")).new_events())
    shown = [event for events in processes for event in events if event["event"] not in ("plan", "done")]
    kept = ("digests", "facts", "metadata")
    assert [{key: value for key, value in event.items() if key not in kept} for event in stored] == shown
    (begin,) = (event for event in stored if "facts" in event)
    assert begin["process"] == 0
    assert begin["facts"]["plan"] == begin["metadata"]["slicecast"]["plan"] == plan.digest
    assert begin["facts"]["leaves"].keys() == {planned.leaf.path for planned in plan.leaves}
    keys = [key for event in stored for key in event.get("digests", ())]
    assert len(keys) == len(set(keys)) == sum(planned.chunk_count for planned in plan.leaves)


def test_a_run_that_goes_on(slicecast: Any, llama: Path, converted: Any) -> None:
    """Of a finished checkpoint nothing is to be done, which is an event too."""
    _, output, _ = converted
    done = slicecast.run("convert", f"--hf_model_path={llama}", f"--base_output_directory={output}", "--log_json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events] == ["plan", "done"]
    assert events[-1]["waves"] == 0
    assert done.stdout == f"load_parameters_path={output}/0/items\n"
