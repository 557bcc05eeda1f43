"""Shows what the kernels' compiled programs move, beside what must move at least.

    python scripts/bench_kernels.py [--op=grouped] [--generation=v5e]
    python scripts/bench_kernels.py --cpu [--op=grouped]

The first form compiles for TPUs, of which none is needed. The least that must move is the quantized weight as it is
stored, and the bfloat16 result. In multiples of that, the table has

* `Pallas`: the bytes of the operands and results of all instructions of the program with the kernel, in the tiles that
  memory consists of. The kernel reads and writes each block once, so its operands and its result are what it moves. The
  compiler's own count would not do: it has nothing about kernels;
* `XLA`: the compiler's count for the program that defines the operation. It is a lower bound, since the compiler counts
  what a loop moves as if the loop had one step;
* `spills`: the kernel's instructions that store and load registers for want of registers.

The second form measures the definition on this machine's CPU, where conversions without TPUs use it. The column `fill`
is the speed of writing a constant into an output of the same size. It is the ceiling that the memory allocator sets:
without huge pages, touching fresh memory can cost more than the arithmetic. On Linux with glibc, the environment
variable `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` makes the allocator ask for huge pages.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from slicecast.kernels import aot
from slicecast.kernels.awq import shapes as awq
from slicecast.kernels.gptq import shapes as gptq
from slicecast.kernels.grouped import shapes as grouped
from slicecast.kernels.implementation import Implementation


class Shape(Protocol):
    """A quantized weight of a real model."""

    def operands(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of what `function` takes."""
        ...

    def function(self, implementation: Implementation) -> Callable[..., jax.Array]:
        """The operation, with a bfloat16 result."""
        ...

    def floor_bytes(self, batch: int) -> int:
        """What must move at least."""
        ...


OPS: dict[str, Sequence[Shape]] = {"grouped": grouped.ALL, "gptq": gptq.ALL, "awq": awq.ALL}

BOUND = 1.1
"""How many times the least a kernel may move."""


def compiled_row(shape: Shape, generation: str, batch: int) -> str:
    """One row of the table of programs."""
    floor = shape.floor_bytes(batch)
    operands = shape.operands(batch)
    xla = aot.compile_for(generation, shape.function("xla"), *operands).cost_analysis()
    pallas = aot.measure(generation, shape.function("pallas_tpu"), *operands)
    ratio = aot.bytes_moved(pallas.compiled) / floor
    above = f"  more than {BOUND}" if ratio > BOUND else ""
    return (
        f"{shape!s:<74}{generation:>6}{floor / batch / 2**20:>10.1f}{xla['bytes accessed'] / floor:>8.2f}"
        f"{ratio:>8.3f}{pallas.spills:>8}{above}"
    )


def compiled(ops: Sequence[str], generations: Sequence[str], batch: int) -> None:
    """Prints the table of programs."""
    print(f"{'shape':<74}{'TPU':>6}{'least MiB':>10}{'XLA':>8}{'Pallas':>8}{'spills':>8}")
    for op in ops:
        for shape in OPS[op]:
            for generation in generations:
                print(compiled_row(shape, generation, batch), flush=True)


def made_up(operand: jax.ShapeDtypeStruct, random: np.random.Generator) -> jax.Array:
    """Random numbers for an operand: any integers, or floats like those of a model."""
    if jnp.issubdtype(operand.dtype, jnp.integer):
        limits = np.iinfo(operand.dtype)
        return jnp.asarray(random.integers(limits.min, limits.max, operand.shape, operand.dtype, endpoint=True))
    return jnp.asarray(random.standard_normal(operand.shape), operand.dtype)


def median_seconds(function: Callable[..., jax.Array], *operands: Any, runs: int) -> float:
    """The median time of `runs` calls, after one that is not counted."""
    compiled = jax.jit(function).lower(*operands).compile()
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        compiled(*operands).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def cpu_row(shape: Shape, batch: int, runs: int) -> str:
    """One row of the table of speeds."""
    random = np.random.default_rng(0)
    operands = [made_up(operand, random) for operand in shape.operands(batch)]
    function = shape.function("xla")
    result = jax.eval_shape(function, *operands)
    gib = result.size * result.dtype.itemsize / 2**30
    speed = gib / median_seconds(function, *operands, runs=runs)
    ceiling = gib / median_seconds(
        lambda value: jnp.broadcast_to(value, result.shape), jnp.ones((), result.dtype), runs=runs
    )
    return f"{shape!s:<74}{gib * 2**10:>10.1f}{speed:>8.2f}{ceiling:>8.2f}"


def measured(ops: Sequence[str], batch: int, runs: int) -> None:
    """Prints the table of speeds."""
    print(f"{'shape':<74}{'out MiB':>10}{'GiB/s':>8}{'fill':>8}")
    for op in ops:
        for shape in OPS[op]:
            print(cpu_row(shape, batch, runs), flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="an operation; all of them by default")
    parser.add_argument("--generation", choices=aot.TOPOLOGIES, action="append", help="a TPU; all by default")
    parser.add_argument("--batch", type=int, default=2, help="weights in a program")
    parser.add_argument("--cpu", action="store_true", help="measure the definition on this machine's CPU")
    parser.add_argument("--runs", type=int, default=7, help="calls on the CPU, of which the median counts")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    ops = arguments.op or list(OPS)
    if arguments.cpu:
        measured(ops, arguments.batch, arguments.runs)
    else:
        compiled(ops, arguments.generation or list(aot.TOPOLOGIES), arguments.batch)


if __name__ == "__main__":
    main()
