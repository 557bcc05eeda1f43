"""What each process did, wave by wave: beside the checkpoint for whoever asks later, and as lines of JSON for scripts.

    <output>/slicecast-log/<run>-<process>-<part>.jsonl

A bucket cannot append to an object, so a log comes in parts, each written once. What was not yet written when a process
is killed is lost, and nothing depends on it: progress is in the checkpoint itself, and a digest that the log lacks is
computed from what is stored.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from slicecast.convert.errors import StorageError

# Often enough to watch other hosts, and seldom enough for a bucket: 64 hosts make 6 objects a second of it.
SECONDS_BETWEEN_PARTS = 10.0

_PART = re.compile(r"(\w+)-(\d+)-(\d+)\.jsonl")

Event = Mapping[str, Any]


class RunLog:
    """The log of one process in one run. Used from several threads."""

    def __init__(
        self,
        directory: epath.Path,
        run: str,
        process: int,
        echo: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        """A log in a directory that will be made; each event also goes to `echo`."""
        self._directory = directory
        self._prefix = f"{run}-{process}"
        self._common = {"run": run, "process": process}
        self._echo = echo
        self._clock = clock
        self._written = clock()
        self._parts = 0
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def add(self, event: str, *, kept: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """Adds an event.

        Args:
            event: What happened.
            kept: Fields for the file alone, too long to be shown.
            **fields: What is known of it.

        Raises:
            StorageError: If storage fails.
        """
        record = {"event": event, "time": round(time.time(), 3), **self._common, **fields}
        self._echo(record)
        with self._lock:
            self._lines.append(json.dumps({**record, **(kept or {})}))
            if self._clock() - self._written >= SECONDS_BETWEEN_PARTS:
                self._write()

    def flush(self) -> None:
        """Writes what has not been written.

        Raises:
            StorageError: If storage fails.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._lines:
            return
        file = self._directory / f"{self._prefix}-{self._parts}.jsonl"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in self._lines))
        except Exception as error:  # Each backend of epath has its own.
            raise StorageError(f"{file}: cannot be written: {error}. Run the same command again.") from error
        self._parts += 1
        self._lines.clear()
        self._written = self._clock()


class LogReader:
    """Reads the logs of all processes and runs, each part once."""

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._read: set[str] = set()

    def new_events(self, run: str | None = None) -> Iterator[Event]:
        """The events that were written since the last call; those of one run, if it is named."""
        if not self._directory.exists():
            return
        found = [(matched, file) for file in self._directory.iterdir() if (matched := _PART.fullmatch(file.name))]
        for matched, file in sorted(found, key=lambda part: (part[0][1], int(part[0][2]), int(part[0][3]))):
            if file.name in self._read or run not in (None, matched[1]):
                continue
            lines = file.read_text().splitlines()
            self._read.add(file.name)  # Not before: a part that storage fails to give is asked for again.
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    break  # On a disk, a part that its writer was killed in ends anywhere.
