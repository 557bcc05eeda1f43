"""Runs in each process of a conversion: says how far it is, and makes its disk fail. Imported before it is forked."""

import atexit
import errno
import faulthandler
import functools
import os
import resource
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# All that a conversion uses, so that each process has it from the start.
import gcsfs  # noqa: F401
import huggingface_hub  # noqa: F401
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint._src.serialization import ocdbt_utils

from slicecast.convert import chunk_store, cli, conversion, hosts
from slicecast.convert.source import bucket, directory, hub, reader  # noqa: F401

# What a conversion does, in this order; of several processes only the first does the last three.
PHASES = ("start", "plan", "read", "write", "merge", "commit", "summary")

# Where each begins, but for the first. A commit is one of the item and one of the step.
_BEGINNINGS: Sequence[tuple[Any, str, str]] = (
    (conversion, "make_plan", "plan"),
    (reader.Reader, "read", "read"),
    (chunk_store.ChunkWriter, "write", "write"),
    (ocdbt_utils, "merge_ocdbt_per_process_files", "merge"),
    (ocp_path.atomicity.AtomicRenameTemporaryPath, "finalize", "commit"),
    (ocp_path.atomicity.CommitFileTemporaryPath, "finalize", "commit"),
    (conversion._Conversion, "summarize", "summary"),
)

# The threads of forked processes would be missing.
assert len(os.listdir("/proc/self/task")) == 1


@dataclass(frozen=True)
class DiskFault:
    """What happens to a process's disk.

    Attributes:
        kind: `full`: files take no more bytes. `error`: one read fails. `short`: reads deliver half of what they could.
        phase: When it happens: at the beginning of a phase.
        count: The how-manyth.
    """

    kind: str
    phase: str
    count: int


@dataclass(frozen=True)
class Settings:
    """How a process differs from that of a user.

    Attributes:
        heartbeat_seconds: When a process that says nothing is taken for dead.
        bucket_seconds: Between two commits to a database in a bucket.
        prelude: Python code that it runs first.
        disk: What happens to its disk.
    """

    heartbeat_seconds: int
    bucket_seconds: float
    prelude: str
    disk: DiskFault | None


class _Watch:
    """Says where the process is. Used from several threads."""

    def __init__(self, events: Connection, disk: DiskFault | None):
        self._events = events
        self._disk = disk
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reached(self, phase: str) -> None:
        """Called at the beginning of a phase."""
        with self._lock:
            self._counts[phase] += 1
            struck = self._disk is not None and (phase, self._counts[phase]) == (self._disk.phase, self._disk.count)
        # One write, not `send`: this may be the process's last act, and half a message would be none.
        os.write(self._events.fileno(), f"{phase}\n".encode())
        if struck and self._disk is not None:
            os.write(self._events.fileno(), b"struck\n")
            _DISK_FAULTS[self._disk.kind]()

    def hook(self, owner: Any, name: str, phase: str) -> None:
        """Makes a function say that a phase begins."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def hooked(*arguments: Any, **options: Any) -> Any:
            self.reached(phase)
            return original(*arguments, **options)

        setattr(owner, name, hooked)


def _fill_disk() -> None:
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, largest))


def _fail_one_read() -> None:
    original, failed = os.preadv, threading.Event()

    def preadv(*arguments: Any) -> int:
        if failed.is_set():
            return original(*arguments)
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.preadv = preadv


def _shorten_reads() -> None:
    original = os.preadv

    def preadv(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        return original(file, [buffers[0][: -(-len(buffers[0]) // 2)]], offset)

    os.preadv = preadv  # type: ignore[assignment]


_DISK_FAULTS: Mapping[str, Callable[[], None]] = {"full": _fill_disk, "error": _fail_one_read, "short": _shorten_reads}


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    settings: Settings,
    events: Connection,
    output: Connection,
) -> None:
    """Runs the command line.

    Args:
        arguments: Those of the command line.
        environment: Variables beside those of the campaign.
        settings: What is different.
        events: Gets a line for each beginning of a phase, and `struck` for a fault of the disk.
        output: Gets what the process writes.
    """
    # A pipe: a full disk takes no messages.
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    hosts._HEARTBEAT_SECONDS = settings.heartbeat_seconds
    chunk_store._BUCKET_SECONDS_BETWEEN_COMMITS = settings.bucket_seconds
    exec(settings.prelude, {})
    watch = _Watch(events, settings.disk)
    for beginning in _BEGINNINGS:
        watch.hook(*beginning)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # A full disk is an error, not a signal.
    faulthandler.register(signal.SIGUSR1)  # Sent to what hangs.
    sys.argv[:] = ["slicecast", *arguments]
    watch.reached("start")
    try:
        cli.run()
    finally:
        # multiprocessing leaves them out, and JAX parts from other processes in one of them.
        atexit._run_exitfuncs()
