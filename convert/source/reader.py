"""Reads byte ranges of a checkpoint's files. No other module reads the source's bytes.

A local directory (a disk, NFS, a mounted bucket) is read with `preadv` straight into the arrays that the caller gets.
Other storage goes through `tensorstore.KvStore`, whose values are copied twice on the way. Files are never mapped into
memory: mapped pages count as ours, and only the kernel decides for how long.

Measured with 2 cores and a warm page cache (peak RSS over what was there before, divided by the bytes asked for):
    bytes asked for       64 MiB   256 MiB   512 MiB
    preadv                  1.00      1.00      1.00    3.5-6.5 GiB/s where the memory was touched before
    KvStore                 3.00      2.69      1.84    0.5-1.1 GiB/s
so that KvStore takes, for a while and beside the bytes asked for, about 4 * MAX_REQUEST_BYTES * CONCURRENCY = 512 MiB.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from slicecast.convert.errors import ReadError

Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]

# Large enough to pay for an object store's first-byte latency (tens of ms at some 100 MB/s), and one Kimi-K2 expert's
# packed projection (7.3 MB) stays whole; small enough that a large tensor is read by several requests at once.
MAX_REQUEST_BYTES = 16 << 20
# Requests in flight over all callers. Local disks saturate with fewer; object stores want at least this many streams.
# It also bounds what KvStore takes beside the bytes asked for (above).
CONCURRENCY = 8
# Linux refuses more buffers in one preadv call (IOV_MAX).
MAX_BUFFERS = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of one file.

    Attributes:
      file: name relative to the checkpoint's directory.
      offset: position of the first byte.
      nbytes: length in bytes; may be 0.
    """

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a request that lands in `arrays[index][start : start + nbytes]`."""

    index: int
    start: int
    nbytes: int


@dataclass(slots=True)
class Request:
    """One read from storage: adjacent bytes of one file, scattered into the pieces in order."""

    file: str
    offset: int
    nbytes: int
    pieces: list[Piece]


def plan_requests(spans: Sequence[Span], max_bytes: int = MAX_REQUEST_BYTES) -> list[Request]:
    """Joins spans that touch, up to `max_bytes` a request, and cuts spans that are longer. Pure.

    Spans may come in any order, may overlap (the common bytes are read twice), and may be empty (no request).
    """
    requests: list[Request] = []
    for index in sorted(range(len(spans)), key=lambda i: (spans[i].file, spans[i].offset)):
        span = spans[index]
        for start in range(0, span.nbytes, max_bytes):
            piece, offset = Piece(index, start, min(max_bytes, span.nbytes - start)), span.offset + start
            last = requests[-1] if requests else None
            if (
                last is not None
                and (last.file, last.offset + last.nbytes) == (span.file, offset)
                and last.nbytes + piece.nbytes <= max_bytes
                and len(last.pieces) < MAX_BUFFERS
            ):
                last.pieces.append(piece)
                last.nbytes += piece.nbytes
            else:
                requests.append(Request(span.file, offset, piece.nbytes, [piece]))
    return requests


def local_directory(path: str) -> str | None:
    """Returns the local directory that a path or `file://` URL names, or None for other storage."""
    if path.startswith("file://"):
        return unquote(path.removeprefix("file://"))
    return None if "://" in path else path


def open_store(path: str) -> ts.KvStore:
    """Opens the key-value store whose keys are the file names below `path` (a directory or any TensorStore URL)."""
    directory = local_directory(path)
    if directory is None:
        return ts.KvStore.open(path.rstrip("/") + "/").result()
    return ts.KvStore.open({"driver": "file", "path": os.path.abspath(directory) + "/"}).result()


class Reader:
    """Reads byte ranges, from any number of threads.

    Attributes:
      path: the checkpoint's directory or URL.
    """

    def __init__(self, path: str, *, concurrency: int = CONCURRENCY):
        self.path = path
        directory = local_directory(path)
        self._fetch = partial(_fetch_store, open_store(path)) if directory is None else partial(_fetch_local, directory)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="slicecast-read")
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._requests = 0

    @property
    def bytes_read(self) -> int:
        """Bytes that successful requests have delivered so far."""
        with self._lock:
            return self._bytes_read

    @property
    def requests(self) -> int:
        """Requests that have succeeded so far; spans that touch share one."""
        with self._lock:
            return self._requests

    def read(self, spans: Sequence[Span]) -> list[Bytes]:
        """Reads all spans at once and waits for them.

        Returns:
          One array per span, in order: uint8 [nbytes], C-contiguous, each with its own memory.

        Raises:
          ReadError: storage failed, or a file ends before a span does. The other requests are over by then.
          ValueError: a span has a negative offset or length.
        """
        for span in spans:
            if span.offset < 0 or span.nbytes < 0:
                raise ValueError(f"{span} has a negative offset or length")
        arrays = [np.empty(span.nbytes, np.uint8) for span in spans]
        futures = [self._pool.submit(self._run, request, arrays) for request in plan_requests(spans)]
        _, unfinished = wait(futures, return_when=FIRST_EXCEPTION)
        for future in unfinished:
            future.cancel()
        wait(futures)  # A request under way still writes into the arrays.
        for future in futures:
            if not future.cancelled():
                future.result()
        return arrays

    def _run(self, request: Request, arrays: Sequence[Bytes]) -> None:
        targets = [arrays[p.index].data[p.start : p.start + p.nbytes] for p in request.pieces]
        self._fetch(request, targets)
        with self._lock:
            self._bytes_read += request.nbytes
            self._requests += 1


def _fetch_local(directory: str, request: Request, targets: list[memoryview]) -> None:
    """Reads one request of a local file into `targets`."""
    got = 0
    try:
        descriptor = os.open(os.path.join(directory, request.file), os.O_RDONLY)
        try:
            while targets:
                count = os.preadv(descriptor, targets, request.offset + got)
                if count == 0:
                    raise _read_error(request, got, f"the file ends at byte {request.offset + got}")
                got += count
                targets = _after(targets, count)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _read_error(request, got, str(error)) from error


def _after(targets: list[memoryview], count: int) -> list[memoryview]:
    """Drops the first `count` bytes: the kernel may deliver less than it was asked for (2 GiB a call on Linux)."""
    for done, target in enumerate(targets):
        if count < len(target):
            return [target[count:], *targets[done + 1 :]]
        count -= len(target)
    return []


def _fetch_store(store: ts.KvStore, request: Request, targets: list[memoryview]) -> None:
    """Reads one request through TensorStore and copies it into `targets`."""
    try:
        result = store.read(request.file, byte_range=slice(request.offset, request.offset + request.nbytes)).result()
    except Exception as error:  # TensorStore maps a status to one of many built-in types.
        raise _read_error(request, 0, str(error)) from error
    if result.state != "value":
        raise _read_error(request, 0, "there is no such file")
    value = memoryview(result.value)
    if len(value) != request.nbytes:
        raise _read_error(request, len(value), "storage delivered another number of bytes")
    for target in targets:
        target[:], value = value[: len(target)], value[len(target) :]


def _read_error(request: Request, got: int, cause: str) -> ReadError:
    return ReadError(
        f"{request.file}: bytes [{request.offset}, {request.offset + request.nbytes}): found {got} bytes, expected "
        f"{request.nbytes}: {cause}. Check that the file is complete, readable and not being changed, then run the "
        f"same command again."
    )
