"""The plan: everything that will be read, computed and written, by whom and in which order. From headers only.

    leaf     an array of the target tree, cut into chunks (`tiles.py`)
    box      a set of whole chunks of one leaf, whose source is whole rows of some tensors: the unit of work
    wave     boxes that one process converts and commits together: the unit of memory and of progress

Boxes are formed from the leaves and the memory budget alone; then they are put in the order of the source files and
dealt to the processes in runs of about equal bytes. So each source byte is read once for each leaf that it belongs to,
which is one leaf but for a few families, each chunk is written by one process, and processes never wait for each other.

The digest identifies what is written: the source, the rules, the leaves and their chunks. It does not depend on budgets
or on the number of processes, so an interrupted run can be resumed on other machines.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes  # noqa: F401  Makes NumPy know bfloat16.
import numpy as np

from slicecast.convert import tiles
from slicecast.convert.box import Box, Shape, grid_size
from slicecast.convert.codecs.base import Kernel, StoredTensor
from slicecast.convert.errors import BudgetError
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.resolve import Ignored, ResolvedLeaf
from slicecast.convert.mapping.rules import Model
from slicecast.convert.mapping.target import Layout, Leaf
from slicecast.convert.memory import (
    BOX_SHARE_OF_BUDGET,
    GB,
    MAX_BOX_BYTES,
    MAX_DEVICE_SLOTS,
    MAX_WAVES_IN_FLIGHT,
    Costs,
    Machine,
    chips_used,
    row_shares,
)
from slicecast.convert.sharding import Sharding
from slicecast.convert.source.checkpoint import Checkpoint, fingerprint
from slicecast.convert.tiles import Tiling


@dataclass(frozen=True)
class PlannedLeaf:
    """A leaf, its sources, and how it is cut.

    Attributes:
        leaf: The leaf.
        sources: The stored tensors by stack coordinate.
        tiling: How it is cut into chunks.
    """

    leaf: Leaf
    sources: dict[Shape, StoredTensor]
    tiling: Tiling

    @property
    def itemsize(self) -> int:
        """Bytes of an element on disk."""
        return np.dtype(self.leaf.dtype).itemsize

    @property
    def chunk_count(self) -> int:
        """How many chunks the leaf has."""
        return grid_size(self.leaf.shape, self.tiling.chunk)

    @property
    def nbytes(self) -> int:
        """Size before compression."""
        return int(np.prod(self.leaf.shape)) * self.itemsize

    def rows(self, box: Box) -> tuple[int, int]:
        """The rows of each source tensor that a box needs, as (start, stop)."""
        rule = self.leaf.rule
        source = ops.boxes(rule.ops, self.leaf.element_box(box), rule.shape)[0]
        return source.start[0], source.stop[0]

    def tensors(self, box: Box) -> list[StoredTensor]:
        """The source tensors that a box needs, in row-major order of the stacked axes."""
        return [self.sources[coordinate] for coordinate in self.leaf.coordinates(box)]

    def is_copy(self, tensors: Sequence[StoredTensor]) -> bool:
        """Whether these tensors' bytes are the leaf's bytes, so that there is nothing to compute."""
        same = all(not t.codec.changes_values and t.parts[0].dtype.name == self.leaf.dtype for t in tensors)
        return same and not self.leaf.rule.ops


@dataclass(frozen=True, slots=True)
class WorkBox:
    """A box to convert.

    Attributes:
        leaf: Its leaf.
        box: The region of the leaf.
        costs: Its bytes.
    """

    leaf: PlannedLeaf
    box: Box
    costs: Costs


@dataclass(frozen=True, slots=True)
class Wave:
    """Boxes that one process converts and commits together."""

    boxes: tuple[WorkBox, ...]

    @property
    def in_bytes(self) -> int:
        """Source bytes."""
        return sum(work.costs.in_bytes for work in self.boxes)

    @property
    def out_bytes(self) -> int:
        """Output bytes before compression."""
        return sum(work.costs.out_bytes for work in self.boxes)

    def host_bytes(self, machine: Machine) -> int:
        """Peak bytes on the host while the wave is in flight."""
        return sum(work.costs.host_bytes(machine) for work in self.boxes)


@dataclass(frozen=True)
class Plan:
    """What a conversion does; see the module docstring.

    Attributes:
        checkpoint: The source.
        model: What its config describes.
        layout: How the target tree is laid out.
        quantization: What the checkpoint announces about its quantization, for people.
        leaves: The target tree.
        ignored: What is left out.
        machine: The machines and their budgets.
        waves: For each process, its work in order.
        waves_in_flight: How many waves a process works on at once, as far as its budget allows.
        device_slots: How many boxes are on a host's chips at once.
        digest: Identifies what is written, in hexadecimal.
    """

    checkpoint: Checkpoint
    model: Model
    layout: Layout
    quantization: str
    leaves: tuple[PlannedLeaf, ...]
    ignored: tuple[Ignored, ...]
    machine: Machine
    waves: tuple[tuple[Wave, ...], ...]
    waves_in_flight: int
    device_slots: int
    digest: str

    @property
    def in_bytes(self) -> int:
        """Source bytes that are read, by all processes."""
        return sum(wave.in_bytes for waves in self.waves for wave in waves)

    @property
    def out_bytes(self) -> int:
        """Output bytes before compression."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def kernels(self) -> frozenset[Kernel]:
        """The kernels that decode its tensors."""
        found = {tensor.codec.kernel for leaf in self.leaves for tensor in leaf.sources.values()}
        return frozenset(kernel for kernel in found if kernel is not None)

    @property
    def boxes(self) -> Iterator[WorkBox]:
        """All boxes, in the order of processes and waves."""
        return (work for waves in self.waves for wave in waves for work in wave.boxes)

    @property
    def host_bytes_in_flight(self) -> int:
        """The most bytes that any host holds at once, beyond what the program itself takes."""
        most = 0
        for waves in self.waves:
            costs = [wave.host_bytes(self.machine) for wave in waves]
            most = max([most] + [sum(costs[i : i + self.waves_in_flight]) for i in range(len(costs))])
        # Waves are begun in order, each only when it fits the budget beside those in flight.
        return min(most, self.machine.host_bytes)

    @property
    def device_bytes_in_flight(self) -> int:
        """The most bytes that any chip holds at once."""
        return self.device_slots * max(_device_bytes(work, self.machine) for work in self.boxes)


def make(
    checkpoint: Checkpoint,
    model: Model,
    layout: Layout,
    quantization: str,
    resolved: Sequence[ResolvedLeaf],
    ignored: Sequence[Ignored],
    machine: Machine,
    sharding: Sharding | None = None,
) -> Plan:
    """The plan for a resolved checkpoint on these machines.

    Args:
        checkpoint: The source.
        model: What its config describes.
        layout: How the target tree is laid out.
        quantization: What the checkpoint announces about its quantization, for people.
        resolved: The target tree.
        ignored: What is left out.
        machine: The machines and their budgets.
        sharding: How those who will read the result cut it; None for chunks that suit most meshes.

    Raises:
        BudgetError: If a memory budget is below what the smallest unit of work needs.
    """
    leaves = tuple(
        PlannedLeaf(item.leaf, item.sources, tiles.choose(item.leaf, np.dtype(item.leaf.dtype).itemsize, sharding))
        for item in sorted(resolved, key=lambda item: item.leaf.path)
    )
    waves, device_slots = _arranged(leaves, machine)
    return Plan(
        checkpoint=checkpoint,
        model=model,
        layout=layout,
        quantization=quantization,
        leaves=leaves,
        ignored=tuple(ignored),
        machine=machine,
        waves=waves,
        waves_in_flight=MAX_WAVES_IN_FLIGHT,
        device_slots=device_slots,
        digest=_digest(checkpoint, leaves),
    )


def for_machine(plan: Plan, machine: Machine) -> Plan:
    """The plan that writes the same on other machines.

    Raises:
        BudgetError: If a memory budget is below what the smallest unit of work needs.
    """
    waves, device_slots = _arranged(plan.leaves, machine)
    return replace(plan, machine=machine, waves=waves, device_slots=device_slots)


def _arranged(leaves: Sequence[PlannedLeaf], machine: Machine) -> tuple[tuple[tuple[Wave, ...], ...], int]:
    """The waves of each process, and how many boxes are on a host's chips at once."""
    box_bytes = min(MAX_BOX_BYTES, machine.host_bytes // BOX_SHARE_OF_BUDGET)
    boxes = [work for leaf in leaves for work in _boxes(leaf, box_bytes)]
    boxes.sort(key=_source_position)
    waves = tuple(tuple(_waves(share, box_bytes)) for share in _shares(boxes, machine.hosts))
    _check_host_budget([wave for share in waves for wave in share], machine)
    return waves, _device_slots(boxes, machine)


def _boxes(planned: PlannedLeaf, box_bytes: int) -> Iterator[WorkBox]:
    """The boxes of a leaf: columns of chunks, grown along rows, then experts, then layers, up to `box_bytes`."""
    leaf, tiling = planned.leaf, planned.tiling
    step = list(tiling.column)
    rows = [] if tiling.row_axis is None else [tiling.row_axis]
    experts = [axis for axis, stack in leaf.stacked if stack.placeholder == "expert"]
    layers = [axis for axis, stack in leaf.stacked if stack.placeholder == "layer"]
    for axis in rows + experts + layers:
        fits = box_bytes // (int(np.prod(step)) * planned.itemsize)
        step[axis] = min(leaf.shape[axis], step[axis] * max(1, fits))
        if step[axis] < leaf.shape[axis]:
            break  # Growing further would leave gaps between the rows, or between the experts, that a box reads.
    for box in Box.whole(leaf.shape).tiles(tuple(step)):
        start, stop = planned.rows(box)
        tensors = planned.tensors(box)
        costs = Costs(
            in_bytes=sum(tensor.read_bytes(start, stop) for tensor in tensors),
            prepared_bytes=sum(tensor.prepared_bytes(stop - start) for tensor in tensors),
            out_bytes=box.size * planned.itemsize,
            on_device=not planned.is_copy(tensors),
        )
        yield WorkBox(planned, box, costs)


def _source_position(work: WorkBox) -> tuple[str, int]:
    """Where a box's source begins: the file, and the byte in it."""
    first = next(work.leaf.leaf.coordinates(work.box))
    parts = work.leaf.sources[first].parts
    if not parts:
        return "", 0  # Nothing is read for it.
    span = parts[0].spans(*work.leaf.rows(work.box))[0]
    return span.file, span.offset


def _shares(boxes: Sequence[WorkBox], hosts: int) -> list[list[WorkBox]]:
    """The boxes in `hosts` runs of about equal bytes, read and written."""
    total = sum(work.costs.in_bytes + work.costs.out_bytes for work in boxes)
    shares: list[list[WorkBox]] = [[] for _ in range(hosts)]
    done = 0
    for work in boxes:
        nbytes = work.costs.in_bytes + work.costs.out_bytes
        middle = done + nbytes // 2
        shares[min(hosts - 1, middle * hosts // max(total, 1))].append(work)
        done += nbytes
    return shares


def _waves(boxes: Sequence[WorkBox], wave_bytes: int) -> Iterator[Wave]:
    """Consecutive boxes in waves of at most `wave_bytes` of output, or of one box."""
    wave: list[WorkBox] = []
    nbytes = 0
    for work in boxes:
        if wave and nbytes + work.costs.out_bytes > wave_bytes:
            yield Wave(tuple(wave))
            wave, nbytes = [], 0
        wave.append(work)
        nbytes += work.costs.out_bytes
    if wave:
        yield Wave(tuple(wave))


def _check_host_budget(waves: Sequence[Wave], machine: Machine) -> None:
    largest = max(waves, key=lambda wave: wave.host_bytes(machine))
    needed = largest.host_bytes(machine)
    if needed > machine.host_bytes:
        work = max(largest.boxes, key=lambda work: work.costs.host_bytes(machine))
        raise BudgetError(
            f"leaf '{work.leaf.leaf.path}': the smallest unit of work is a box of {list(work.box.shape)}, which needs "
            f"{needed / GB:.2f} GB of host memory; the budget is {machine.host_bytes / GB:.2f} GB. "
            f"Give --host_memory_gb={_round_up(needed / GB)} or more."
        )


def _device_slots(boxes: Sequence[WorkBox], machine: Machine) -> int:
    if machine.device_bytes is None:
        return MAX_DEVICE_SLOTS
    largest = max(boxes, key=lambda work: _device_bytes(work, machine))
    needed = _device_bytes(largest, machine)
    if needed > machine.device_bytes:
        raise BudgetError(
            f"leaf '{largest.leaf.leaf.path}': a box of {list(largest.box.shape)} needs {needed / GB:.2f} GB of each "
            f"chip's memory; the budget is {machine.device_bytes / GB:.2f} GB. Give --device_memory_gb="
            f"{_round_up(needed / GB)} or more, or a smaller --host_memory_gb, which makes smaller boxes."
        )
    return min(MAX_DEVICE_SLOTS, machine.device_bytes // max(needed, 1))


def _device_bytes(work: WorkBox, machine: Machine) -> int:
    row_axis = work.leaf.tiling.row_axis
    tensors = work.leaf.tensors(work.box)
    rows = None if row_axis is None else work.box.shape[row_axis]
    shares = min((row_shares(rows, tensor.codec.row_unit) or 1 for tensor in tensors), default=1)
    over_batch, over_rows = chips_used(len(tensors), shares, machine.devices)
    return work.costs.device_bytes(over_batch * over_rows)


def _round_up(gigabytes: float) -> str:
    """The number with one decimal, rounded up so that it suffices as a budget."""
    return f"{int(gigabytes * 10 + 1) / 10:g}"


def _digest(checkpoint: Checkpoint, leaves: Sequence[PlannedLeaf]) -> str:
    sha = hashlib.sha256(fingerprint(checkpoint).encode())
    for planned in leaves:
        leaf = planned.leaf
        codecs = sorted({repr(stored.codec) for stored in planned.sources.values()})
        identity = (leaf.path, leaf.shape, leaf.dtype, leaf.rule, leaf.layer, planned.tiling, codecs)
        sha.update(repr(identity).encode())
    return sha.hexdigest()
