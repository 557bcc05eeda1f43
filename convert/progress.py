"""Shows a conversion while it runs: a bar on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from slicecast.convert.memory import GB
from slicecast.convert.pipeline import WaveReport

# A line for every wave of a large model would be thousands; on a log, one every few seconds is enough.
_SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """What one process has done so far. A context manager; `report` may be called from several threads.

    Attributes:
        waves: Waves finished in this run or found finished.
        resumed: Waves that an earlier run had finished.
    """

    def __init__(
        self,
        console: Console,
        waves: int,
        out_bytes: int,
        host_budget_bytes: int,
        label: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        """A display for a process that has `waves` waves with `out_bytes` bytes of output."""
        self._console = console
        self._total_waves = waves
        self._total_bytes = out_bytes
        self._budget = host_budget_bytes
        self._label = label
        self._clock = clock
        self._start = self._last_line = clock()
        self._lock = threading.Lock()
        self._in_bytes = self._out_bytes = self._done_bytes = 0
        self.waves = self.resumed = 0
        self._hosts = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("", total=max(out_bytes, 1))

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, wave: WaveReport) -> None:
        """Counts a wave, and shows the state if it is time to."""
        with self._lock:
            self.waves += 1
            self._done_bytes += wave.done_bytes
            self._in_bytes += wave.in_bytes
            self._out_bytes += wave.out_bytes
            if not wave.out_bytes:
                self.resumed += 1
            now = self._clock()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done_bytes, description=self._line(now))
            elif now - self._last_line >= _SECONDS_BETWEEN_LINES or self.waves == self._total_waves:
                self._last_line = now
                self._console.print(self._line(now), highlight=False, soft_wrap=True)

    def compare(self, done: Mapping[int, float]) -> None:
        """Takes note of what part of its work each host has done, so that a slow one is seen."""
        slowest = min(done, key=done.__getitem__)
        with self._lock:
            self._hosts = (
                f"  hosts {100 * done[slowest]:.0f} to {100 * max(done.values()):.0f} % (slowest: host {slowest})"
            )

    def _line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        remaining = self._total_bytes - self._done_bytes
        left = "?"
        if self._out_bytes or not remaining:
            left = _duration(remaining * elapsed / max(self._out_bytes, 1))
        return (
            f"{self._label}wave {self.waves}/{self._total_waves}"
            f"  in {self._in_bytes / GB:.2f} GB ({self._in_bytes / GB / elapsed:.2f} GB/s)"
            f"  out {self._out_bytes / GB:.2f} GB ({self._out_bytes / GB / elapsed:.2f} GB/s)"
            f"  rss {resident_bytes() / GB:.2f} GB (budget {self._budget / GB:g} GB)  left {left}"
            f"{self._hosts}"
        )


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
