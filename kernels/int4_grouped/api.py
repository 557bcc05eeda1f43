"""The entry point of the operation: chooses an implementation, and maps it over a sharded batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from slicecast.kernels.int4_grouped import pallas_tpu, reference

Implementation = Literal["auto", "xla", "pallas_tpu"]


def dequantize(
    packed: jax.Array,
    scale: jax.Array,
    *,
    group_size: int,
    dtype: DTypeLike,
    implementation: Implementation = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Dequantizes a batch of grouped symmetric INT4 weights and transposes them.

    `y[b, k, n] = (nibble(b, n, k) - 8) * scale[b, n, k // group_size]`, a float32 product, rounded once to `dtype`.

    Inside `jax.jit` the arguments must not be divided over devices: the compiler cannot see into a Pallas kernel, and
    would gather them. Call it inside `jax.shard_map` then, or use `sharded`.

    Args:
      packed: uint8[batch, out, in/2]. Byte j of a row holds element 2j (low nibble) and 2j+1 (high nibble).
      scale: bfloat16, float16 or float32[batch, out, in/group_size].
      group_size: Elements of a row that share a scale. It divides `in`; `in` itself is the channel strategy.
      dtype: bfloat16 or float32.
      implementation: "xla" is the reference. "pallas_tpu" is the TPU kernel. "auto" is the TPU kernel where the program
        is compiled for a TPU and the kernel supports the shape, and the reference everywhere else.
      interpret: Passed to the TPU kernel, for tests on a CPU.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation, or "pallas_tpu" does not support their shape.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {get_args(Implementation)}, not {implementation!r}")
    reference.check(packed, scale, group_size=group_size, dtype=dtype)
    xla = functools.partial(reference.dequantize, group_size=group_size, dtype=dtype)
    pallas = functools.partial(pallas_tpu.dequantize, group_size=group_size, dtype=dtype, interpret=interpret)
    if implementation == "pallas_tpu":
        return pallas(packed, scale)
    if implementation == "xla" or pallas_tpu.supported(packed.shape[1], 2 * packed.shape[2], group_size) is not None:
        return xla(packed, scale)
    # Decided when the program is lowered, so that ahead-of-time compilation for a TPU chooses as the TPU itself would.
    y: jax.Array = lax.platform_dependent(packed, scale, tpu=pallas, default=xla)
    return y


def sharded(
    mesh: Mesh,
    axes: str | tuple[str, ...],
    *,
    group_size: int,
    dtype: DTypeLike,
    implementation: Implementation = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `dequantize` for arguments whose batch is divided over mesh axes.

    Each device dequantizes the weights it holds; nothing is communicated. The result is divided as the arguments are.
    Use it inside `jax.jit` like a plain function of the global arrays.

    Args:
      mesh: The mesh the arguments live on.
      axes: The mesh axis or axes over which the batch is divided. Their size must divide the batch.
      group_size: See `dequantize`.
      dtype: See `dequantize`.
      implementation: See `dequantize`.
      interpret: See `dequantize`.

    Returns:
      A function of `packed` uint8[batch, out, in/2] and `scale` [batch, out, in/group_size] to dtype[batch, in, out].
    """
    function = functools.partial(
        dequantize, group_size=group_size, dtype=dtype, implementation=implementation, interpret=interpret
    )
    spec = PartitionSpec(axes)
    # The check of replication does not know Pallas kernels. Nothing is communicated, so there is nothing to check.
    return jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
