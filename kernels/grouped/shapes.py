"""Shapes of real models, for tests and measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from slicecast.kernels.grouped import api, formats
from slicecast.kernels.grouped.formats import Code, ScaleFormat
from slicecast.kernels.implementation import Implementation


@dataclasses.dataclass(frozen=True)
class Shape:
    """One quantized weight of a real model.

    Attributes:
      model: The checkpoint it comes from.
      weight: The projections of this shape.
      rows: Output features.
      columns: Input features.
      code: How an element is stored.
      group_size: Elements of a row that share a scale; equal to `columns` if there is one for each row.
      scale_format: How a scale is stored.
      scale_dtype: The dtype of the scales.
      rows_per_scale: Rows that share a stored scale. The host repeats it for each of them.
      zero: Whether the format has zero points. They are stored in as many bits as the codes.
    """

    model: str
    weight: str
    rows: int
    columns: int
    code: Code
    group_size: int
    scale_format: ScaleFormat = "float"
    scale_dtype: DTypeLike = jnp.bfloat16
    rows_per_scale: int = 1
    zero: bool = False

    def operands(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of what `function` takes: codes, a scale for each row, and what else there is."""
        bits = formats.BITS[self.code]
        groups = (batch, self.rows, self.columns // self.group_size)
        codes = jax.ShapeDtypeStruct((batch, self.rows, self.columns * bits // 8), jnp.uint8)
        operands = [codes, jax.ShapeDtypeStruct(groups, self.scale_dtype)]
        if self.zero:
            operands.append(jax.ShapeDtypeStruct(groups, jnp.int8))
        if self.scale_format == "e4m3":
            operands.append(jax.ShapeDtypeStruct((batch, formats.SIGNIFICANDS), jnp.float32))
        return tuple(operands)

    def function(self, implementation: Implementation, dtype: DTypeLike = jnp.bfloat16) -> Callable[..., jax.Array]:
        """The operation on `operands`, with a result of a dtype."""

        def dequantize(codes: jax.Array, scale: jax.Array, *rest: jax.Array) -> jax.Array:
            return api.dequantize(
                codes,
                scale,
                code=self.code,
                group_size=self.group_size,
                dtype=dtype,
                scale_format=self.scale_format,
                zero=rest[0] if self.zero else None,
                significands=rest[-1] if self.scale_format == "e4m3" else None,
                implementation=implementation,
            )

        return dequantize

    def floor_bytes(self, batch: int) -> int:
        """What must move at least: codes, scales and zero points as they are stored, and the bfloat16 result."""
        bits = formats.BITS[self.code]
        groups = self.columns // self.group_size
        scale_bits = 8 * jnp.dtype(self.scale_dtype).itemsize * -(-self.rows // self.rows_per_scale) * groups
        zero_bits = bits * self.rows * groups if self.zero else 0
        return batch * ((bits + 16) * self.rows * self.columns + scale_bits + zero_bits) // 8

    def __str__(self) -> str:
        """A name that is readable in test ids and tables."""
        scale = self.scale_format if self.scale_format != "float" else jnp.dtype(self.scale_dtype).name
        zero = " zero" if self.zero else ""
        return f"{self.model} {self.weight} [{self.rows}, {self.columns}] {self.code} g{self.group_size} {scale}{zero}"


def _block_fp8(model: str, scale_dtype: DTypeLike, weights: dict[str, tuple[int, int]]) -> tuple[Shape, ...]:
    """Weights in E4M3 with a scale for each block of 128 x 128."""
    return tuple(
        Shape(model, weight, rows, columns, "e4m3", 128, scale_dtype=scale_dtype, rows_per_scale=128)
        for weight, (rows, columns) in weights.items()
    )


DEEPSEEK_V3 = _block_fp8(
    "DeepSeek-V3",
    jnp.float32,
    {
        "expert gate/up": (2048, 7168),
        "expert down": (7168, 2048),
        "mlp gate/up": (18432, 7168),
        "mlp down": (7168, 18432),
        "q_a": (1536, 7168),
        "q_b": (24576, 1536),
        "kv_a": (576, 7168),
        "kv_b": (32768, 512),
        "o": (7168, 16384),
    },
)

QWEN3_235B = _block_fp8(
    "Qwen3-235B-A22B",
    jnp.bfloat16,
    {
        "expert gate/up": (1536, 4096),
        "expert down": (4096, 1536),
        "q": (8192, 4096),
        "k/v": (512, 4096),
        "o": (4096, 8192),
    },
)

KIMI_K2 = (
    Shape("Kimi-K2", "expert gate/up", 2048, 7168, "int4_offset", 32),
    Shape("Kimi-K2", "expert down", 7168, 2048, "int4_offset", 32),
)

GPT_OSS_120B = (
    Shape("gpt-oss-120b", "expert gate/up", 5760, 2880, "e2m1", 32, "e8m0", jnp.uint8),
    Shape("gpt-oss-120b", "expert down", 2880, 2880, "e2m1", 32, "e8m0", jnp.uint8),
)

DEEPSEEK_R1_NVFP4 = (
    Shape("DeepSeek-R1 NVFP4", "expert gate/up", 2048, 7168, "e2m1", 16, "e4m3", jnp.uint8),
    Shape("DeepSeek-R1 NVFP4", "expert down", 7168, 2048, "e2m1", 16, "e4m3", jnp.uint8),
)

MXFP8 = (Shape("MXFP8", "expert gate/up", 2048, 7168, "e4m3", 32, "e8m0", jnp.uint8),)

_LLAMA_3_1_8B = {"gate/up": (14336, 4096), "down": (4096, 14336), "q/o": (4096, 4096), "k/v": (1024, 4096)}

LLAMA_3_1_8B_W4A16 = tuple(
    Shape("Llama-3.1-8B w4a16", weight, rows, columns, "int4_offset", 128, zero=zero)
    for zero in (False, True)
    for weight, (rows, columns) in _LLAMA_3_1_8B.items()
)

LLAMA_3_1_8B_CHANNEL = tuple(
    Shape("Llama-3.1-8B channel", weight, rows, columns, code, columns)
    for code in ("int4_offset", "int8", "e4m3")
    for weight, (rows, columns) in _LLAMA_3_1_8B.items()
)

ALL = (
    DEEPSEEK_V3
    + QWEN3_235B
    + KIMI_K2
    + GPT_OSS_120B
    + DEEPSEEK_R1_NVFP4
    + MXFP8
    + LLAMA_3_1_8B_W4A16
    + LLAMA_3_1_8B_CHANNEL
)
