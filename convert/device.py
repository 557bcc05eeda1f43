"""The device step: stored bytes in, values in MaxText's layout out, on all chips of this host.

One program is compiled for each signature (codec, ops, shapes) and used for every box that has it. A batch of tensors
is spread over a mesh of this process's chips, first over the batch and then over the rows of each tensor, so that every
chip works on the same amount and nothing crosses between chips.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slicecast.convert.box import Box, Shape
from slicecast.convert.codecs.base import Codec, Kernel
from slicecast.convert.errors import first_line
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import Computing, Op, Slice, Transpose
from slicecast.convert.memory import chips_used, row_shares
from slicecast.kernels import awq, gptq, grouped
from slicecast.kernels.implementation import Implementation

_BATCH, _ROWS = "batch", "rows"

_KERNELS: dict[Kernel, Callable[[jax.Device], bool]] = {
    "grouped": grouped.kernel_agrees,
    "gptq": gptq.kernel_agrees,
    "awq": awq.kernel_agrees,
}


@dataclass(frozen=True)
class Step:
    """What is computed for each tensor of a batch.

    Attributes:
        codec: How the prepared arrays become values.
        ops: How the values are laid out.
        source: The shape of the whole source tensor.
        element: The shape of the part of the tensor's target that is computed. Where the part lies does not matter.
        row_axis: The target axis that follows the source's rows; None if the rows must stay together.
        dtype: The dtype of the result.
        implementation: Which kernel the codec uses, if it has one.
    """

    codec: Codec
    ops: tuple[Op, ...]
    source: Shape
    element: Shape
    row_axis: int | None
    dtype: str
    implementation: Implementation = "auto"

    @property
    def rows(self) -> int | None:
        """Into how many shares the rows can be divided at most; None if they must stay together."""
        return None if self.row_axis is None else row_shares(self.element[self.row_axis], self.codec.row_unit)

    def spec(self, array: int) -> PartitionSpec:
        """How a prepared array, stacked over the batch, is divided over a mesh with the axes `batch` and `rows`."""
        row_axis = self.codec.row_axes[array]
        return PartitionSpec(_BATCH) if row_axis is None else PartitionSpec(_BATCH, *[None] * row_axis, _ROWS)


class DeviceRunner:
    """Runs steps on this process's devices. Used from several threads.

    Attributes:
        devices: The devices.
    """

    def __init__(self, devices: Sequence[jax.Device], slots: int):
        """A runner that has at most `slots` batches on the devices at once."""
        self.devices = tuple(devices)
        self._slots = threading.BoundedSemaphore(slots)

    def run(self, step: Step, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The values `[batch, *step.element]` from prepared arrays, stacked over the batch."""
        over_batch, over_rows = chips_used(len(arrays[0]), step.rows, len(self.devices))
        mesh = Mesh(np.array(self.devices[: over_batch * over_rows]).reshape(over_batch, over_rows), (_BATCH, _ROWS))
        shardings = tuple(NamedSharding(mesh, step.spec(i)) for i in range(len(arrays)))
        with self._slots:
            on_device = jax.device_put(tuple(arrays), shardings)
            values = program(step, mesh, len(arrays))(*on_device)
            return np.asarray(values)


@functools.lru_cache(maxsize=1024)
def program(step: Step, mesh: Mesh, arrays: int) -> jax.stages.Wrapped:
    """The program of a step for a mesh with the axes `batch` and `rows`, made once and kept.

    It takes as many prepared arrays, divided as `step.spec` says, to the values `[batch, *step.element]`.
    """
    over_rows = mesh.shape[_ROWS]
    local = _share_of_rows(step, over_rows)
    shapes = [box.shape for box in ops.boxes(step.ops, local, step.source)[1:]]
    spec = [_BATCH] + [None] * len(step.element)
    if step.row_axis is not None:
        spec[step.row_axis + 1] = _ROWS
    mapped = jax.shard_map(
        functools.partial(_convert, step=step, shapes=shapes),
        mesh=mesh,
        in_specs=tuple(step.spec(i) for i in range(arrays)),
        out_specs=PartitionSpec(*spec),
        # The outputs of kernels carry no record of how they vary over the mesh.
        check_vma=False,
    )
    return jax.jit(mapped)


def choose_implementation(device: jax.Device, kernels: Iterable[Kernel]) -> tuple[Implementation, str | None]:
    """Which implementation of these kernels to use on a device, and a warning if it is not the fast one.

    On a TPU the kernels are compared with their definitions, on the chip itself, before anything is converted.
    """
    if device.platform != "tpu":
        return "auto", None
    for kernel in sorted(kernels):
        try:
            if _KERNELS[kernel](device):
                continue
            found = "gives other values than its definition"
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            # A kernel may also be refused while it is lowered, before there is a program.
            found = f"does not run ({first_line(error)})"
        return "xla", f"the kernel '{kernel}' {found} on {device.device_kind}; the slower XLA program is used instead"
    return "auto", None


def _share_of_rows(step: Step, parts: int) -> Box:
    """The target box that the first of `parts` equal shares of a step's rows gives."""
    whole = Box.whole(step.element)
    return whole if step.row_axis is None else whole.with_axis(step.row_axis, 0, step.element[step.row_axis] // parts)


def _convert(*arrays: jax.Array, step: Step, shapes: Sequence[Shape]) -> jax.Array:
    """The step for one chip's share, `[batch, *shapes[-1]]`."""
    # Values stay exact in float32 until an op has computed with them; without such an op they are rounded at once.
    dtype = "float32" if any(isinstance(op, Computing) for op in step.ops) else step.dtype
    # A range of rows was taken when they were read. Codecs can give the transposed values that most rules ask for next.
    first = 1 if step.ops and isinstance(step.ops[0], Slice) and step.ops[0].axis == 0 else 0
    transposed = step.ops[first : first + 1] == (Transpose(),)
    x = step.codec.decode(arrays, dtype=dtype, transposed=transposed, implementation=step.implementation)
    first += transposed
    x = jax.vmap(lambda element: ops.apply(step.ops[first:], element, shapes[first:]))(x)
    return x.astype(step.dtype)
