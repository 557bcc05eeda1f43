"""The entry point of the operation: chooses an implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels import affine
from slicecast.kernels.awq import pallas_tpu, reference
from slicecast.kernels.implementation import Implementation, choose

# The weights of `kernel_agrees`: rows, columns and group size. The first has several blocks on both axes, the last of
# them ragged, and a ragged last group. The second has one group and is smaller than a block.
_CHECKED = ((1088, 2112, 128), (96, 72, 96))


def dequantize(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    group_size: int,
    dtype: DTypeLike,
    implementation: Implementation = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Dequantizes a batch of AWQ weights of the `gemm` version, which are stored as [in, out] already.

    `y[b, k, n] = (code(b, k, n) - zero[b, g, n]) * scale[b, g, n]` with `g = k // group_size`, a float32 product,
    rounded once to `dtype`.

    Inside `jax.jit` the arguments must not be divided over devices: the compiler cannot see into a Pallas kernel, and
    would gather them. Call it inside `jax.shard_map` then.

    Args:
      words: int32[batch, in, out/8]. Column `n = 8 * w + i` is the 4 bits of word column w from bit
        `4 * (0, 4, 1, 5, 2, 6, 3, 7)[i]` on. There may be more words than `out` needs; see `padded_words`.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out], the code that stands for zero.
      group_size: Consecutive elements that share a scale and a zero. The last group may be shorter.
      dtype: bfloat16 or float32.
      implementation: "xla" is the reference. "pallas_tpu" is the TPU kernel. "auto" is the TPU kernel where the program
        is compiled for a TPU and the kernel supports the shape, and the reference everywhere else.
      interpret: Passed to the TPU kernel, for tests on a CPU.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation, or "pallas_tpu" does not support their shape.
    """
    reference.check(words, scale, zero, group_size=group_size, dtype=dtype)
    return choose(
        implementation,
        words,
        scale,
        zero,
        xla=functools.partial(reference.dequantize, group_size=group_size, dtype=dtype),
        pallas_tpu=functools.partial(pallas_tpu.dequantize, group_size=group_size, dtype=dtype, interpret=interpret),
        unsupported=pallas_tpu.supported(words.shape[1], scale.shape[2], group_size),
    )


def padded_words(columns: int) -> int:
    """How many words a row should have for the TPU kernel: whole register tiles.

    XLA keeps an array in the order of axes that pads least. If rows are not whole tiles, that is often the transposed
    order, and the words are copied before the kernel reads them: a program that moves 1.4 times as many bytes.

    Args:
      columns: Output features, `out`.
    """
    return -(-columns // pallas_tpu.UNIT) * affine.LANES


def kernel_agrees(device: jax.Device, *, interpret: bool | pltpu.InterpretParams = False) -> bool:
    """Whether the TPU kernel and the reference give the same bits on a device, on small weights of random codes.

    A compiler that accepts the kernel may still get it wrong; this takes a few seconds and needs no data.

    Args:
      device: Where both are run.
      interpret: Passed to the TPU kernel, for tests on a CPU.
    """
    random = np.random.default_rng(0)
    for rows, columns, group_size in _CHECKED:
        words = random.integers(-(2**31), 2**31, (2, rows, columns // reference.PER_WORD), np.int32)
        scale = random.normal(0, 0.01, (2, -(-rows // group_size), columns)).astype(np.float16)
        zero = random.integers(0, 16, scale.shape, np.uint8)
        function = functools.partial(dequantize, group_size=group_size, dtype=jnp.bfloat16, interpret=interpret)
        if not affine.same_bits(function, (words, scale, zero), device):
            return False
    return True
