"""Reads byte ranges of a checkpoint's files. No other module reads the source's data.

A local directory is read straight into the arrays that the caller gets; other storage hands over values, which are
copied. Files are never mapped into memory: mapped pages count as ours, and only the kernel decides for how long.

Measured with 2 cores and a warm page cache (peak RSS over what was there before, divided by the bytes asked for):
    bytes asked for       64 MiB   256 MiB   512 MiB
    preadv                  1.00      1.00      1.00    3.5-6.5 GiB/s where the memory was touched before
    TensorStore             3.00      2.69      1.84    0.5-1.1 GiB/s
so that TensorStore takes, for a while and beside the bytes asked for, 4 * MAX_REQUEST_BYTES * CONCURRENCY = 512 MiB.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from slicecast.convert.source.storage import ByteRange, Storage, open_storage

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


class Reader:
    """Reads byte ranges, from any number of threads.

    Attributes:
      storage: where the files are.
    """

    def __init__(self, storage: Storage | str, *, concurrency: int = CONCURRENCY):
        """A reader of a storage, or of what a path stands for."""
        self.storage = open_storage(storage) if isinstance(storage, str) else storage
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
        self.storage.read(ByteRange(request.file, request.offset, request.nbytes), targets)
        with self._lock:
            self._bytes_read += request.nbytes
            self._requests += 1
