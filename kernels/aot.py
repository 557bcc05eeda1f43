"""Ahead-of-time compilation for TPUs on a machine that has none.

The compiler ships in the package `libtpu`, and one process can compile for every generation. This proves that a program
compiles and fits the device's memories, and shows what it moves through them. It says nothing about numerics.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest whole host of each generation: four chips."""

ENVIRONMENT = {
    # Ask nothing of the cloud's metadata server: there is none, and each query would wait for a timeout.
    "TPU_SKIP_MDS_QUERY": "1",
    # No TPU is opened, so several processes may load the library at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # What the metadata server would have said. The topology named in the call decides what is compiled.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What the library reads from the environment when it loads."""


_REPORT = "final_hlo-static-per-bundle-utilization"
"""The compiler's report on what the core's units do in each instruction bundle, spilling registers among it."""


@functools.cache
def _reports() -> tempfile.TemporaryDirectory[str]:
    """Says what the library needs to hear before it loads, and returns the folder that it will write reports to."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("compiling for a TPU needs the package libtpu")
    library = pathlib.Path(spec.origin).with_name("libtpu.so")
    for name, value in {**ENVIRONMENT, "TPU_LIBRARY_PATH": str(library)}.items():
        os.environ.setdefault(name, value)
    # The folder goes when the process ends.
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="slicecast-aot-")
    # There are hundreds of reports, of which one is wanted.
    flags = f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_REPORT}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
    return folder


@functools.cache
def devices(generation: str) -> Sequence[jax.Device]:
    """Returns the described, absent devices of one host of a TPU generation.

    Args:
      generation: A key of `TOPOLOGIES`.

    Raises:
      ModuleNotFoundError: `libtpu` is not installed.
    """
    _reports()
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices)


def compile_for(generation: str, function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """Compiles `function` for one TPU device.

    Args:
      generation: A key of `TOPOLOGIES`.
      function: A function of arrays.
      *arguments: The arrays' shapes and dtypes.

    Returns:
      The compiled program, which can be inspected but not run.
    """
    sharding = SingleDeviceSharding(devices(generation)[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    return jax.jit(function).lower(*placed).compile()


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the compiler says about a program.

    Attributes:
      compiled: The compiled program, which can be inspected but not run.
      kernels: The names of its Pallas kernels.
      spills: Instructions of these kernels that store a vector register for want of registers, or load it again.
    """

    compiled: jax.stages.Compiled
    kernels: tuple[str, ...]
    spills: int


def measure(generation: str, function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> Measurement:
    """Compiles `function` as `compile_for` does, and reads the compiler's report. Not for several threads at once."""
    folder = pathlib.Path(_reports().name)
    for path in folder.iterdir():
        path.unlink()
    compiled = compile_for(generation, function, *arguments)
    kernels = tuple(_KERNEL.findall(str(compiled.as_text())))
    reports = [next(folder.glob(f"*-{kernel}-*-{_REPORT}.txt")).read_text() for kernel in kernels]
    return Measurement(compiled, kernels, sum(_spills(report) for report in reports))


def _spills(report: str) -> int:
    """The spills in one report: a line that names the core's units, and for each bundle how many of each work."""
    names = next(line for line in report.splitlines() if "VSTORE:SPILL" in line).split(", ")
    spilling = [i for i, name in enumerate(names) if name in ("VSTORE:SPILL", "VLOAD:FILL")]
    bundles = report.partition("== UTILIZATION:\n")[2].splitlines()
    counts = [line.split() for line in bundles if line[:1].isdigit()]
    return sum(int(count[i]) for count in counts for i in spilling)


_KERNEL = re.compile(r'%(\S+) = .* custom-call\(.*custom_call_target="tpu_custom_call"')
"""The name of a Pallas kernel in the text of a program."""

_FREE = frozenset(
    # Names for what is there already.
    ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
    # Moves an operand into on-chip memory before its reader starts, whose reading is counted.
    + ("copy-start", "copy-done")
)
"""Instructions that move nothing between a device's memory and its core."""

_LOOPS = ("while", "conditional", "call")
"""Instructions that run other computations, how often the text of the program does not say."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)")
"""Name, type, operation and operands of a line such as `%copy = u8[2,128]{1,0:T(8,128)(4,1)S(1)} copy(%bitcast.4)`."""

_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]\{([\d,]*)(?::T\(([\d,]+)\))?")
"""Dtype, dimensions, their order from minor to major, and the tile of a type such as `u8[2,128]{1,0:T(8,128)(4,1)}`."""


def bytes_moved(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a program without loops moves between a device's memory and its core.

    These are the operands and the result of each instruction, in the tiles that they are stored in. The compiler's own
    `cost_analysis()` leaves out tiles, and counts nothing for a Pallas kernel. Here a kernel counts like any
    instruction, as if it read each operand once and wrote its result once: whoever relies on it must know that of it.

    Buffers in on-chip memory count like others. The compiler puts small ones there, and bigger batches have big ones.

    Raises:
      ValueError: The program has loops.
    """
    _, _, entry = str(compiled.as_text()).partition("\nENTRY ")
    stored: dict[str, int] = {}
    moved = 0
    for name, types, operation, operands in _INSTRUCTION.findall(entry):
        stored[name] = sum(_stored_bytes(*array) for array in _ARRAY.findall(types))
        if operation in _LOOPS:
            raise ValueError(f"cannot count what a program with the instruction {operation} moves")
        if operation not in _FREE:
            moved += stored[name] + sum(stored[operand] for operand in re.findall(r"%([^\s,]+)", operands))
    assert moved, "a program does something"
    return moved


def _stored_bytes(dtype: str, dimensions: str, minor_to_major: str, tile: str) -> int:
    """The bytes of an array whose minor dimensions are padded to whole tiles. The arguments are groups of `_ARRAY`."""
    sizes = [int(size) for size in dimensions.split(",") if size]
    order = [int(axis) for axis in minor_to_major.split(",") if axis]
    for axis, size in zip(order, [int(size) for size in reversed(tile.split(",")) if size], strict=False):
        sizes[axis] = -(-sizes[axis] // size) * size
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(sizes) * bits // 8
