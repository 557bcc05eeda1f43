"""Shows a conversion while it runs: a table of its hosts on a terminal, plain lines elsewhere.

What is known of a host are the events of its log (`run_log.py`): this host's as they happen, those of others when they
have been read from storage. `table` and `line` say what is shown of it, and depend on nothing else.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slicecast.convert.errors import first_line
from slicecast.convert.memory import GB
from slicecast.convert.pipeline import STAGES
from slicecast.convert.run_log import Event

# A line for every wave of a large model would be thousands; on a log, one every few seconds is enough.
_SECONDS_BETWEEN_LINES = 5.0

# A wave of half a GB seldom takes as long, even at 10 MB/s, and an event of another host is seen within 20 seconds.
_SECONDS_OF_SILENCE = 60.0

# With two lines of headers and a total, these fit into a terminal of 24 lines. Of more hosts the slowest are shown, for
# they decide when the conversion ends, and the fastest, to compare them with.
_MAX_ROWS = 16

# Names of hosts get what the other columns leave them: number and a part of the name at a width of 80.
_OTHER_COLUMNS = 68
_NAME_WIDTHS = (12, 32)
_BAR_WIDTH = 24

# Parts of the memory budget from which the memory is colored.
_COLORS = ((0.95, "bold red"), (0.8, "yellow"))


@dataclass(frozen=True)
class HostProgress:
    """How far a host is.

    Attributes:
        process: The number of its process.
        total_waves: Waves that it has.
        total_bytes: Bytes of output of all of them.
        heard: When the last event came to be known, by the clock of who shows it.
        name: The name of the machine; "" as long as nothing has been heard.
        waves: Waves finished in this run or found finished.
        resumed: Waves that an earlier run had finished.
        done_bytes: Bytes of output of the finished waves.
        in_bytes: Source bytes read in this run.
        out_bytes: Bytes of output written in this run.
        seconds: Time of all boxes, by stage.
        rss_bytes: The memory that it held at the last event.
        began: When it began, by its own clock.
        latest: When the last event was, by its own clock.
        error: What ended its work, if something did.
    """

    process: int
    total_waves: int
    total_bytes: int
    heard: float = 0.0
    name: str = ""
    waves: int = 0
    resumed: int = 0
    done_bytes: int = 0
    in_bytes: int = 0
    out_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    rss_bytes: int = 0
    began: float = 0.0
    latest: float = 0.0
    error: str | None = None

    @property
    def part(self) -> float:
        """The part of its work that is done."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at the speed so far; None if that is not known."""
        remaining = self.total_bytes - self.done_bytes
        if not remaining:
            return 0.0
        speed = self.rate(self.out_bytes)
        return remaining / speed if speed else None

    def rate(self, nbytes: int) -> float:
        """What so many bytes since the start are in a second."""
        elapsed = self.latest - self.began
        return nbytes / elapsed if elapsed > 0 else 0.0

    def silence(self, now: float) -> float:
        """For how many seconds nothing has been heard; 0 if that is no reason to worry."""
        silent = now - self.heard
        return silent if silent >= _SECONDS_OF_SILENCE and self.part < 1 and self.error is None else 0.0

    def after(self, event: Event, now: float) -> "HostProgress":
        """The state after one more of its events, which comes to be known now."""
        heard = replace(
            self,
            heard=now,
            # Threads that add events at the same time may do so in another order.
            latest=max(self.latest, event["time"]),
            rss_bytes=event.get("rss_bytes", self.rss_bytes),
        )
        match event["event"]:
            case "begin":
                return replace(heard, name=event["host"], began=event["time"])
            case "wave":
                return replace(
                    heard,
                    waves=self.waves + 1,
                    resumed=self.resumed + bool(event["resumed"]),
                    done_bytes=self.done_bytes + event["done_bytes"],
                    in_bytes=self.in_bytes + event["in_bytes"],
                    out_bytes=self.out_bytes + event["written_bytes"],
                    seconds={stage: self.seconds.get(stage, 0) + event["seconds"].get(stage, 0) for stage in STAGES},
                )
            case "end":
                return replace(heard, error=event["error"] and first_line(event["error"]))
        return heard


class ProgressDisplay:
    """Shows how far all hosts are. A context manager; used from several threads."""

    def __init__(
        self,
        console: Console,
        hosts: Sequence[HostProgress],
        process: int,
        budget_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int] | None = None,
    ):
        """A display that knows of no events yet.

        Args:
            console: Where it is shown.
            hosts: All hosts.
            process: Which of them is this one.
            budget_bytes: The memory budget of each.
            clock: Tells the seconds.
            memory: Tells the memory that this process holds.
        """
        self._console = console
        self._process = process
        self._budget = budget_bytes
        self._clock = clock
        self._memory = memory or resident_bytes
        self._last_line = clock()
        self._lock = threading.Lock()
        self._hosts = {host.process: replace(host, heard=self._last_line) for host in hosts}
        self._done = self._who_is_done()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal and not console.quiet:
            self._live = Live(console=console, get_renderable=self._table)

    def __enter__(self) -> "ProgressDisplay":
        if self._live is not None:
            self._live.start()
            # Rich hides it until the end, which SIGKILL, and JAX when a host vanishes, do not wait for.
            self._console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def own(self) -> HostProgress:
        """How far this host is."""
        with self._lock:
            return self._hosts[self._process]

    def add(self, event: Event) -> None:
        """Takes note of an event of a host."""
        with self._lock:
            process = event["process"]
            self._hosts[process] = self._hosts[process].after(event, self._clock())

    def show(self) -> None:
        """Prints a line, if it is time to and there is no table."""
        if self._live is not None:
            return
        with self._lock:
            now, done = self._clock(), self._who_is_done()
            if now - self._last_line < _SECONDS_BETWEEN_LINES and done == self._done:
                return
            self._last_line, self._done = now, done
        text = line(self._known(), self._process, self._budget, now)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _who_is_done(self) -> tuple[bool, bool]:
        """Whether this host is done, and whether all are."""
        return self._hosts[self._process].part == 1, all(host.part == 1 for host in self._hosts.values())

    def _table(self) -> RenderableType:
        return table(self._known(), self._budget, self._clock(), self._console.width)

    def _known(self) -> list[HostProgress]:
        with self._lock:
            # What ends this host's work is printed below the table.
            own = replace(self._hosts[self._process], rss_bytes=self._memory(), error=None)
            return list({**self._hosts, self._process: own}.values())


def line(hosts: Sequence[HostProgress], process: int, budget_bytes: int, now: float) -> str:
    """What a plain line says: how far one host is, and between which the others are."""
    own = hosts[process]
    left = own.seconds_left
    words = [
        f"{f'host {process} of {len(hosts)}: ' if len(hosts) > 1 else ''}wave {own.waves}/{own.total_waves}",
        f"in {own.in_bytes / GB:.2f} GB ({own.rate(own.in_bytes) / GB:.2f} GB/s)",
        f"out {own.out_bytes / GB:.2f} GB ({own.rate(own.out_bytes) / GB:.2f} GB/s)",
        f"rss {own.rss_bytes / GB:.2f} GB (budget {budget_bytes / GB:g} GB)",
        f"left {'?' if left is None else _duration(left)}",
    ]
    if any(host.name for host in hosts if host is not own):
        slowest, fastest = min(hosts, key=_part), max(hosts, key=_part)
        parts = f"hosts {_percent(slowest.part)} to {_percent(fastest.part)} % (slowest: host {slowest.process})"
        words.append(parts if slowest.part < 1 else "all hosts are done")
    return "  ".join([*words, *_remarks(hosts, now)])


def table(hosts: Sequence[HostProgress], budget_bytes: int, now: float, width: int) -> RenderableType:
    """What a terminal of a width shows: a row for each host, or for the slowest and the fastest, and one for all.

    The memory of all is that of the host that holds most; the time left is that of the slowest.
    """
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    name_width = min(max(width - _OTHER_COLUMNS, _NAME_WIDTHS[0]), _NAME_WIDTHS[1])
    shown.add_column("\nhost", no_wrap=True, overflow="ellipsis", max_width=name_width)
    shown.add_column("\ndone", max_width=_BAR_WIDTH)  # The only column that may wrap, so the one that gives way.
    for header in ("", "read\nGB/s", "write\nGB/s", "% of time in\nread/device/write"):
        shown.add_column(header, justify="right", no_wrap=True)
    shown.add_column(f"memory\nof {budget_bytes / GB:g} GB", justify="right", no_wrap=True)
    shown.add_column("time\nleft", justify="right", no_wrap=True)
    ordered, left_out = list(hosts), 0
    if len(hosts) > _MAX_ROWS:
        ordered, left_out = sorted(hosts, key=_part), len(hosts) - _MAX_ROWS + 1
        del ordered[_MAX_ROWS - 2 : -1]
    for place, host in enumerate(ordered):
        if left_out and place == len(ordered) - 1:
            shown.add_row(f"... {left_out} more", style="dim")
        style = "red" if host.error is not None else "yellow" if host.silence(now) else ""
        shown.add_row(*_cells(f"{host.process} {host.name}".strip(), [host], budget_bytes), style=style)
    if len(hosts) > 1:
        shown.add_row(*_cells(f"all {len(hosts)}", hosts, budget_bytes), style="bold")
    remarks = Text("\n".join(_remarks(hosts, now)), style="yellow")
    return Group(shown, remarks) if remarks else shown


def _cells(label: str, hosts: Sequence[HostProgress], budget_bytes: int) -> list[RenderableType]:
    """A row of the table, on one host or on several together."""
    total = sum(host.total_bytes for host in hosts)
    done = sum(host.done_bytes for host in hosts)
    lefts = [host.seconds_left for host in hosts]
    known = [left for left in lefts if left is not None]
    left = "done" if done == total else _duration(max(known)) if len(known) == len(lefts) else "?"
    memory = max(host.rss_bytes for host in hosts)
    style = next((color for part, color in _COLORS if memory > part * budget_bytes), "")
    return [
        Text(label),
        ProgressBar(total=max(total, 1), completed=done if total else 1),
        f"{_percent(done / total if total else 1.0)} %",
        f"{sum(host.rate(host.in_bytes) for host in hosts) / GB:.2f}",
        f"{sum(host.rate(host.out_bytes) for host in hosts) / GB:.2f}",
        _shares([sum(host.seconds.get(stage, 0.0) for host in hosts) for stage in STAGES]),
        Text(f"{memory / GB:.1f} GB" if memory else "?", style=style),
        left,
    ]


def _shares(seconds: Sequence[float]) -> Text:
    """The part of the time that each stage took, in percent; the largest, which is the bottleneck, stands out."""
    total = sum(seconds)
    if not total:
        return Text("?")
    parts = [Text(f"{100 * part / total:3.0f}", style="bold cyan" if part == max(seconds) else "") for part in seconds]
    return Text("/").join(parts)


def _remarks(hosts: Sequence[HostProgress], now: float) -> list[str]:
    """What somebody should look at: hosts that failed, and the one from which nothing has been heard for longest."""
    named = {host.process: f"host {host.process}{f' ({host.name})' if host.name else ''}" for host in hosts}
    failed = [f"{named[host.process]} failed: {host.error}" for host in hosts if host.error is not None]
    silent = [host for host in hosts if host.silence(now)]
    if not silent:
        return failed
    longest = max(silent, key=lambda host: host.silence(now))
    others = f", and of {len(silent) - 1} more" if len(silent) > 1 else ""
    return [*failed, f"no wave of {named[longest.process]} for {_duration(longest.silence(now))}{others}"]


def _part(host: HostProgress) -> float:
    return host.part


def _percent(part: float) -> int:
    """Rounded down, so that 100 means that all is done."""
    return int(100 * part)


def resident_bytes() -> int:
    """The memory that this process holds now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not tell."""
    return _status("VmHWM")


def _status(field: str) -> int:
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields[field].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
