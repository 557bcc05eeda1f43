"""The entry point of the operation: chooses an implementation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from slicecast.kernels.grouped import formats, pallas_tpu, reference
from slicecast.kernels.grouped.formats import Code, ScaleFormat
from slicecast.kernels.implementation import Implementation, choose


def dequantize(
    codes: jax.Array,
    scale: jax.Array,
    *,
    code: Code,
    group_size: int,
    dtype: DTypeLike,
    scale_format: ScaleFormat = "float",
    zero: jax.Array | None = None,
    significands: jax.Array | None = None,
    implementation: Implementation = "auto",
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Dequantizes a batch of weights that have a scale for each group of columns of each row, and transposes them.

    `y[b, k, n] = (value(codes[b, n, k]) - zero[b, n, g]) * scale[b, n, g]`, with `g = k // group_size`. Values and
    scales are decoded to float32 exactly. The product is rounded once to float32, and once to `dtype`.

    Numbers below 2**-126, which float32 stores as subnormals, may count as zeros of the same sign, whether they are
    scales or results: neither XLA nor a TPU keeps them. Which NaN a NaN is remains open.

    Inside `jax.jit` the arguments must not be divided over devices: the compiler cannot see into a Pallas kernel, and
    would gather them. Call it inside `jax.shard_map` then.

    Args:
      codes: uint8[batch, out, in * bits / 8]. Where a code has 4 bits, byte j of a row holds element 2j (low nibble)
        and 2j+1 (high nibble).
      scale: bfloat16, float16 or float32[batch, out, in/group_size]; uint8 if the format is not "float".
      code: How an element is stored.
      group_size: Elements of a row that share a scale. It divides `in`; `in` itself means one scale a row.
      dtype: bfloat16 or float32.
      scale_format: How a scale is stored.
      zero: int8[batch, out, in/group_size], which is subtracted from the values of integer codes; None for zeros.
      significands: float32[batch, 16], for the scale format "e4m3" and only for it: `RN(M * f)` for the 16 significands
        M of E4M3, where f is the tensor's factor and RN rounds to float32, or `RN(M / f)` where the factor divides. A
        scale `M * 2**e` then counts as `significands[M] * 2**e`. TPUs do not divide exactly, so the host makes this.
      implementation: "xla" is the reference. "pallas_tpu" is the TPU kernel. "auto" is the TPU kernel where the program
        is compiled for a TPU and the kernel supports the shape, and the reference everywhere else.
      interpret: Passed to the TPU kernel, for tests on a CPU.

    Returns:
      dtype[batch, in, out].

    Raises:
      ValueError: The arguments do not fit the operation, or "pallas_tpu" does not support their shape.
    """

    def using(function: Callable[..., Any]) -> Any:
        return function(
            codes,
            scale,
            code=code,
            group_size=group_size,
            dtype=dtype,
            scale_format=scale_format,
            zero=zero,
            significands=significands,
        )

    using(reference.check)
    return choose(
        implementation,
        xla=functools.partial(using, reference.dequantize),
        pallas_tpu=functools.partial(using, functools.partial(pallas_tpu.dequantize, interpret=interpret)),
        unsupported=pallas_tpu.unsupported(codes, scale, code, group_size, zero),
    )


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A weight of random codes for `kernel_agrees`: how it is stored, and its sides."""

    code: Code
    scale_format: ScaleFormat
    scale_dtype: DTypeLike
    group_size: int
    zero: bool = False
    rows: int = 640
    columns: int = 1536


# Every code, every scale format and dtype, and zeros. Most have several blocks on both axes, of which the last are
# ragged. The sides of two are such that XLA stores their codes, or their results, transposed.
_CHECKED = (
    _Checked("int4_offset", "float", jnp.bfloat16, 32, zero=True),
    _Checked("int8_offset", "float", jnp.float16, 128, zero=True),
    _Checked("int8", "float", jnp.float32, 1536),
    _Checked("e2m1", "e8m0", jnp.uint8, 32, rows=704, columns=1344),
    _Checked("e2m1", "e4m3", jnp.uint8, 16),
    _Checked("e4m3", "float", jnp.float32, 128, rows=704),
    _Checked("e5m2", "e8m0", jnp.uint8, 32),
)


def kernel_agrees(device: jax.Device, *, interpret: bool | pltpu.InterpretParams = False) -> bool:
    """Whether the TPU kernel and the reference give the same bits on a device, for every code and scale format.

    A compiler that accepts the kernel may still get it wrong; this takes seconds and needs no data. Any NaN equals any
    other.

    Args:
      device: Where both are run.
      interpret: Passed to the TPU kernel, for tests on a CPU.
    """
    return all(_agrees(checked, device, interpret) for checked in _CHECKED)


def _agrees(checked: _Checked, device: jax.Device, interpret: bool | pltpu.InterpretParams) -> bool:
    random = np.random.default_rng(0)
    groups = (2, checked.rows, checked.columns // checked.group_size)
    row_bytes = checked.columns * formats.BITS[checked.code] // 8
    operands = {"codes": random.integers(0, 256, (2, checked.rows, row_bytes), np.uint8)}
    if checked.scale_format == "float":
        operands["scale"] = random.normal(0, 0.01, groups).astype(checked.scale_dtype)
    else:
        # Not E8M0's smallest numbers, which give subnormal results: those may differ.
        operands["scale"] = random.integers(64 if checked.scale_format == "e8m0" else 0, 256, groups, np.uint8)
    if checked.zero:
        operands["zero"] = random.integers(-128, 128, groups, np.int8)
    if checked.scale_format == "e4m3":
        operands["significands"] = np.arange(formats.SIGNIFICANDS) / random.uniform(1, 1000, (2, 1)).astype(np.float32)
    placed = jax.device_put(operands, device)

    def run(implementation: Implementation) -> np.ndarray:
        def function(operands: dict[str, jax.Array]) -> jax.Array:
            return dequantize(
                **operands,
                code=checked.code,
                group_size=checked.group_size,
                dtype=jnp.bfloat16,
                scale_format=checked.scale_format,
                implementation=implementation,
                interpret=interpret,
            )

        return np.asarray(jax.jit(function)(placed))

    xla, pallas = run("xla"), run("pallas_tpu")
    same = (xla.view(np.uint16) == pallas.view(np.uint16)) | (np.isnan(xla) & np.isnan(pallas))
    return bool(same.all())
