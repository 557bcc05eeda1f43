"""Shows how far a comparison is: a bar on a terminal, a line now and then elsewhere."""

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from slicecast.convert.memory import GB

# Often enough to see in a log that it goes on, and seldom enough that the comparison of a large model stays a page.
_SECONDS_BETWEEN_LINES = 30.0


class VerifyProgress:
    """How many of a process's bytes have been compared. A context manager; used from several threads."""

    def __init__(self, console: Console, total_bytes: int, *, clock: Callable[[], float] = time.monotonic):
        """Nothing has been compared yet.

        Args:
            console: Where it is shown.
            total_bytes: Bytes to compare.
            clock: Tells the seconds.
        """
        self._console = console
        self._total = total_bytes
        self._clock = clock
        self._done = 0
        self._started = self._last_line = clock()
        self._lock = threading.Lock()
        self._bar = Progress(
            "comparing",
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_bytes)

    def __enter__(self) -> "VerifyProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, nbytes: int) -> None:
        """Takes note of bytes that have been compared."""
        self._bar.advance(self._task, nbytes)
        with self._lock:
            self._done += nbytes
            now = self._clock()
            if self._console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
            done, speed = self._done, self._done / (now - self._started)
        left = (self._total - done) / speed
        self._console.print(
            f"compared {done / GB:.2f} of {self._total / GB:.2f} GB ({speed / GB:.2f} GB/s), {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )
