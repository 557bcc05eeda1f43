"""Measures the reference on this machine's CPU: `python -m slicecast.kernels.int4_grouped.bench`.

The column `fill` is the speed of writing a constant into an output of the same size. It is the ceiling that the memory
allocator sets: without huge pages, touching fresh memory can cost more than the arithmetic. On Linux with glibc, the
environment variable `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` makes the allocator ask for huge pages.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from slicecast.kernels.int4_grouped import reference, shapes


def median_seconds(compiled: jax.stages.Compiled, *arguments: jax.Array, runs: int) -> float:
    """Returns the median time of `runs` calls, after one that is not counted."""
    compiled(*arguments).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        compiled(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(shape: shapes.Shape, *, batch: int, runs: int) -> str:
    """Returns one row of the table."""
    rng = np.random.default_rng(0)
    packed = jnp.asarray(rng.integers(0, 256, (batch, shape.rows, shape.columns // 2), np.uint8))
    scale = jnp.asarray(rng.standard_normal((batch, shape.rows, shape.columns // shape.group_size)), jnp.bfloat16)

    def convert(packed: jax.Array, scale: jax.Array) -> jax.Array:
        return reference.dequantize(packed, scale, group_size=shape.group_size, dtype=jnp.bfloat16)

    def fill(value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value, (batch, shape.columns, shape.rows))

    compiled = jax.jit(convert).lower(packed, scale).compile()
    value = jnp.ones((), jnp.bfloat16)
    output_gib = batch * shape.rows * shape.columns * 2 / 2**30
    speed = output_gib / median_seconds(compiled, packed, scale, runs=runs)
    ceiling = output_gib / median_seconds(jax.jit(fill).lower(value).compile(), value, runs=runs)
    memory = compiled.memory_analysis()
    assert memory is not None, "every backend of interest reports its memory"
    temporary = memory.temp_size_in_bytes
    return f"{shape!s:<56}{speed:>8.2f}{ceiling:>8.2f}{temporary / 2**20:>10.1f}{output_gib * 2**10:>10.1f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="weights per call")
    parser.add_argument("--runs", type=int, default=7, help="calls per shape, of which the median counts")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"XLA:CPU, bfloat16 scales and output, batch {arguments.batch}, median of {arguments.runs} runs")
    print(f"{'shape':<56}{'GiB/s':>8}{'fill':>8}{'temp MiB':>10}{'out MiB':>10}")
    for shape in shapes.ALL:
        print(measure(shape, batch=arguments.batch, runs=arguments.runs), flush=True)


if __name__ == "__main__":
    main()
