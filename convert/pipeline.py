"""Runs this process's part of a plan: reads spans, computes boxes on the devices, hands blocks of chunks to the writer.

A few workers each take the next wave and carry it through all stages: read, compute, write, commit. While one waits for
storage another computes and a third compresses, so the stages overlap without queues between them. A wave begins only
when its bytes fit the budget beside those in flight, so the budget bounds them whatever the sizes of the waves.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import jax
import numpy as np

from slicecast.convert.box import Box
from slicecast.convert.chunk_store import ArraySpec, Block, ChunkWriter
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.device import DeviceRunner, Step
from slicecast.convert.errors import StoppedError
from slicecast.convert.plan import Plan, PlannedLeaf, Wave, WorkBox
from slicecast.convert.source.reader import Reader
from slicecast.kernels.implementation import Implementation


@dataclass(frozen=True)
class WaveReport:
    """What became of a wave.

    Attributes:
        number: Its place among the waves of the process.
        done_bytes: Bytes of output that the wave stands for.
        in_bytes: Bytes that had to be read now.
        out_bytes: Bytes of output that had to be written now; 0 if an earlier run had finished the wave.
        seconds: Time that its boxes took, by stage: `read`, `compute`, `write`.
        digests: The digest of each chunk that was written now, by key.
    """

    number: int
    done_bytes: int
    in_bytes: int = 0
    out_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


Report = Callable[[WaveReport], None]

STAGES = ("read", "compute", "write")


class Stopwatch:
    """How long each stage of one wave has taken. Used by one thread.

    Attributes:
        seconds: By stage.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds the time inside to a stage."""
        start = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - start


def array_spec(planned: PlannedLeaf) -> ArraySpec:
    """How a leaf is stored."""
    leaf, tiling = planned.leaf, planned.tiling
    return ArraySpec(leaf.name, leaf.shape, leaf.dtype, tiling.chunk, tiling.inner)


class _MemoryGate:
    """Lets work in as long as the bytes of all work inside stay within a budget."""

    def __init__(self, budget_bytes: int):
        self._free = budget_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def admit(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


class Pipeline:
    """One process's part of a plan.

    Attributes:
        reader: The source; it counts what was read.
    """

    def __init__(
        self,
        plan: Plan,
        process: int,
        devices: Sequence[jax.Device],
        report: Report,
        check: Callable[[], None],
        implementation: Implementation = "auto",
    ):
        """A pipeline of one process.

        Args:
            plan: The plan.
            process: Whose part of it.
            devices: What computes.
            report: Called after each wave, from the workers' threads.
            check: Called before anything is written, from the workers' threads; an error ends the run.
            implementation: Of the kernels.
        """
        self._plan = plan
        self._waves = plan.waves[process]
        self._runner = DeviceRunner(devices, plan.device_slots)
        self._report = report
        self._check = check
        self._implementation = implementation
        self._gate = _MemoryGate(plan.machine.host_bytes)
        self._stop = threading.Event()
        self._stopped: StoppedError | None = None
        self.reader = Reader(plan.checkpoint.storage)

    def run(self, writer: ChunkWriter) -> None:
        """Carries out the plan; returns when all chunks are durable. The first error stops all and is raised."""
        waves = enumerate(self._waves)
        lock = threading.Lock()
        workers = self._plan.waves_in_flight
        with ThreadPoolExecutor(workers, thread_name_prefix="slicecast-wave") as pool:
            futures = [pool.submit(self._work, waves, lock, writer) for _ in range(workers)]
            self._wait(futures)

    def stop(self, why: StoppedError) -> None:
        """Makes `run` end with this error, when the waves in flight are done."""
        self._stopped = why
        self._stop.set()

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            self._stop.set()
        for future in futures:
            future.result()
        if self._stopped is not None:
            raise self._stopped

    def _work(self, waves: Iterator[tuple[int, Wave]], lock: threading.Lock, writer: ChunkWriter) -> None:
        while not self._stop.is_set():
            with contextlib.ExitStack() as inside:
                with lock:  # Held while waiting for memory too: waves begin in order, so a large one is not overtaken.
                    number, wave = next(waves, (0, None))
                    if wave is None:
                        return
                    todo = [work for work in wave.boxes if writer.missing(array_spec(work.leaf), work.box)]
                    left = Wave(tuple(todo))
                    inside.enter_context(self._gate.admit(left.host_bytes(self._plan.machine)))
                stopwatch = Stopwatch()
                digests: Mapping[str, str] = {}
                if todo:
                    blocks = [self._convert(work, stopwatch) for work in todo]
                    self._check()
                    with stopwatch.measure("write"):
                        digests = writer.write(blocks)
                    del blocks  # Before their memory is given to others.
            self._report(WaveReport(number, wave.out_bytes, left.in_bytes, left.out_bytes, stopwatch.seconds, digests))

    def _convert(self, work: WorkBox, stopwatch: Stopwatch) -> Block:
        """Reads and computes one box."""
        planned, box = work.leaf, work.box
        leaf = planned.leaf
        tensors = planned.tensors(box)
        start, stop = planned.rows(box)
        with stopwatch.measure("read"):
            arrays = self._prepared(tensors, start, stop)
        element = leaf.element_box(box)
        # One array [tensors, *element]; the stacked axes are unfolded from its first axis, in the order of the leaf.
        with stopwatch.measure("compute"):
            values = self._values(planned, tensors, arrays, element)
        stacked = [axis for axis, _ in leaf.stacked]
        values = values.reshape([box.shape[axis] for axis in stacked] + list(element.shape))
        values = np.moveaxis(values, range(len(stacked)), stacked)
        return Block(array_spec(planned), box, values)

    def _prepared(self, tensors: Sequence[StoredTensor], start: int, stop: int) -> list[tuple[np.ndarray, ...]]:
        """Rows of each tensor, read and prepared for the chips."""
        spans = [[part.spans(start, stop) for part in tensor.parts] for tensor in tensors]
        data = iter(self.reader.read([span for of_tensor in spans for of_part in of_tensor for span in of_part]))
        prepared = []
        for tensor, of_tensor in zip(tensors, spans, strict=True):
            views = [
                part.view([next(data) for _ in of_part], start, stop)
                for part, of_part in zip(tensor.parts, of_tensor, strict=True)
            ]
            prepared.append(tensor.prepare(views, start, stop))
        return prepared

    def _values(
        self,
        planned: PlannedLeaf,
        tensors: Sequence[StoredTensor],
        arrays: Sequence[Sequence[np.ndarray]],
        element: Box,
    ) -> np.ndarray:
        """The values of all tensors, `[tensors, *element]`."""
        if planned.is_copy(tensors):
            return _stack([array for (array,) in arrays])
        leaf = planned.leaf
        row_axis = planned.tiling.row_axis
        element_axes = [leaf.element_axis(axis) for axis in range(len(element.shape))]
        results = []
        # Neighbors that are stored alike go to the devices together; commonly that is all of them.
        signatures = [(tensor.codec, _dtypes(prepared)) for tensor, prepared in zip(tensors, arrays, strict=True)]
        for (codec, _), group in itertools.groupby(range(len(tensors)), signatures.__getitem__):
            members = list(group)
            step = Step(
                codec=codec,
                ops=leaf.rule.ops,
                source=leaf.rule.shape,
                element=element.shape,
                row_axis=None if row_axis is None else element_axes.index(row_axis),
                dtype=leaf.dtype,
                implementation=self._implementation,
            )
            batch = [_stack(of_members) for of_members in zip(*(arrays[i] for i in members), strict=True)]
            results.append(self._runner.run(step, batch))
        return results[0] if len(results) == 1 else np.concatenate(results)


def _dtypes(arrays: Sequence[np.ndarray]) -> tuple[np.dtype, ...]:
    return tuple(array.dtype for array in arrays)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The arrays along a new first axis, without a copy if there is only one."""
    return arrays[0][np.newaxis] if len(arrays) == 1 else np.stack(arrays)
