"""The entry point of the operation: chooses an implementation."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels.int4_grouped import pallas_tpu, reference

Implementation = Literal["auto", "xla", "pallas_tpu"]

# The weight of `kernel_agrees`, as bytes [out, in/2], and its group size: several blocks of the kernel on both axes.
_CHECKED_SHAPE = (1024, 1024)
_CHECKED_GROUP = 32


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
    would gather them. Call it inside `jax.shard_map` then.

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


def kernel_agrees(device: jax.Device, *, interpret: bool | pltpu.InterpretParams = False) -> bool:
    """Whether the TPU kernel and the reference give the same bits on a device, on a small weight of random codes.

    A compiler that accepts the kernel may still get it wrong; this takes a second and needs no data.

    Args:
      device: Where both are run.
      interpret: Passed to the TPU kernel, for tests on a CPU.
    """
    random = np.random.default_rng(0)
    packed = random.integers(0, 256, (2, *_CHECKED_SHAPE), np.uint8)
    scale = random.normal(0, 0.01, (2, _CHECKED_SHAPE[0], 2 * _CHECKED_SHAPE[1] // _CHECKED_GROUP)).astype(jnp.bfloat16)
    results = []
    for implementation in ("xla", "pallas_tpu"):
        function = functools.partial(
            dequantize,
            group_size=_CHECKED_GROUP,
            dtype=jnp.bfloat16,
            implementation=implementation,
            interpret=interpret,
        )
        results.append(np.asarray(jax.jit(function)(*jax.device_put((packed, scale), device))))
    return bool(np.array_equal(results[0].view(np.uint16), results[1].view(np.uint16)))
