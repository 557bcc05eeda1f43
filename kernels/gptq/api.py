"""The entry point of the operation: chooses an implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels import affine
from slicecast.kernels.gptq import pallas_tpu, reference
from slicecast.kernels.implementation import Implementation, choose

# The weights of `kernel_agrees`: rows, columns and group size. The first has several blocks on both axes, the last of
# them ragged, and a ragged last group. The second has one group and is smaller than a block.
_CHECKED = ((2112, 1088, 128), (96, 72, 96))


def dequantize(
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    *,
    bits: int,
    group_size: int,
    dtype: DTypeLike,
    group_index: jax.Array | None = None,
    implementation: Implementation = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Dequantizes a batch of GPTQ weights, which are stored as [in, out] already.

    `y[b, k, n] = (code(b, k, n) - zero[b, g, n]) * scale[b, g, n]`, a float32 product, rounded once to `dtype`. The
    group `g` is `k // group_size`, or `group_index[b, k]` where the elements were sorted by activation (`desc_act`).

    Inside `jax.jit` the arguments must not be divided over devices: the compiler cannot see into a Pallas kernel, and
    would gather them. Call it inside `jax.shard_map` then.

    Args:
      words: int32[batch, in * bits / 32, out]. Bits [j * bits, (j + 1) * bits) of word row w are the code of element
        `k = w * (32 / bits) + j`.
      scale: bfloat16, float16 or float32[batch, groups, out].
      zero: uint8[batch, groups, out], the code that stands for zero; the stored one plus 1 in the format's version 1.
      bits: The width of a code: 2, 4 or 8.
      group_size: Consecutive elements that share a scale and a zero. The last group may be shorter.
      dtype: bfloat16 or float32.
      group_index: int32[batch, in], the group of each element, within [0, groups); None for consecutive groups. On a
        TPU it costs 3 bytes of temporary memory for each element.
      implementation: "xla" is the reference. "pallas_tpu" is the TPU kernel. "auto" is the TPU kernel where the program
        is compiled for a TPU and the kernel supports the arguments, and the reference everywhere else.
      interpret: Passed to the TPU kernel, for tests on a CPU.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation, or "pallas_tpu" does not support them.
    """
    reference.check(words, scale, zero, bits=bits, group_size=group_size, dtype=dtype, group_index=group_index)
    unsupported = pallas_tpu.supported(words.shape[1] * reference.WORD_BITS // bits, words.shape[2], group_size)
    if group_index is not None:
        unsupported = "with a group index, the scales of each row are gathered"
    return choose(
        implementation,
        words,
        scale,
        zero,
        xla=functools.partial(
            reference.dequantize, bits=bits, group_size=group_size, dtype=dtype, group_index=group_index
        ),
        pallas_tpu=functools.partial(
            pallas_tpu.dequantize, bits=bits, group_size=group_size, dtype=dtype, interpret=interpret
        ),
        unsupported=unsupported,
    )


def kernel_agrees(device: jax.Device, *, interpret: bool | pltpu.InterpretParams = False) -> bool:
    """Whether the TPU kernel and the reference give the same bits on a device, on small weights of random codes.

    A compiler that accepts the kernel may still get it wrong; this takes a few seconds and needs no data.

    Args:
      device: Where both are run.
      interpret: Passed to the TPU kernel, for tests on a CPU.
    """
    random = np.random.default_rng(0)
    for bits in reference.BITS:
        for rows, columns, group_size in _CHECKED:
            words = random.integers(-(2**31), 2**31, (2, rows * bits // reference.WORD_BITS, columns), np.int32)
            scale = random.normal(0, 0.01, (2, -(-rows // group_size), columns)).astype(np.float16)
            zero = random.integers(0, 2**bits, scale.shape, np.uint8)
            function = functools.partial(
                dequantize, bits=bits, group_size=group_size, dtype=jnp.bfloat16, interpret=interpret
            )
            if not affine.same_bits(function, (words, scale, zero), device):
                return False
    return True
