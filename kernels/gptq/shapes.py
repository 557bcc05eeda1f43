"""Shapes of real models, for tests and measurements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from slicecast.kernels.gptq import api, reference
from slicecast.kernels.implementation import Implementation


@dataclasses.dataclass(frozen=True)
class Shape:
    """One quantized weight of a real model.

    Attributes:
      model: The checkpoint it comes from.
      weight: The projections of this shape.
      rows: Input features.
      columns: Output features.
      bits: The width of a code.
      group_size: Rows that share a scale; equal to `rows` where the checkpoint says -1.
    """

    model: str
    weight: str
    rows: int
    columns: int
    bits: int
    group_size: int

    def operands(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of what `function` takes: words, scales as they are stored, and zeros."""
        groups = (batch, -(-self.rows // self.group_size), self.columns)
        words = (batch, self.rows * self.bits // reference.WORD_BITS, self.columns)
        return (
            jax.ShapeDtypeStruct(words, jnp.int32),
            jax.ShapeDtypeStruct(groups, jnp.float16),
            jax.ShapeDtypeStruct(groups, jnp.uint8),
        )

    def function(self, implementation: Implementation, dtype: DTypeLike = jnp.bfloat16) -> Callable[..., jax.Array]:
        """The operation on `operands`, with a result of a dtype."""
        return functools.partial(
            api.dequantize,
            bits=self.bits,
            group_size=self.group_size,
            dtype=dtype,
            implementation=implementation,
        )

    def floor_bytes(self, batch: int) -> int:
        """What must move at least: the stored words, scales and packed zeros, and the bfloat16 result."""
        groups = -(-self.rows // self.group_size)
        bits_per_column = self.rows * (self.bits + 16) + groups * (16 + self.bits)
        return batch * self.columns * bits_per_column // 8

    def __str__(self) -> str:
        """A name that is readable in test ids and tables."""
        return f"{self.model} int{self.bits} {self.weight} [{self.rows}, {self.columns}] g{self.group_size}"


def _llama_3_1_8b(bits: int, group_size: int | None) -> tuple[Shape, ...]:
    """The weights of Llama-3.1-8B; without a group size, with one group per column."""
    sides = {"gate/up": (4096, 14336), "down": (14336, 4096), "q/o": (4096, 4096), "k/v": (4096, 1024)}
    return tuple(
        Shape("Llama-3.1-8B", weight, rows, columns, bits, group_size or rows)
        for weight, (rows, columns) in sides.items()
    )


QWEN_2_5_72B = (
    Shape("Qwen2.5-72B", "gate/up", 8192, 29568, 4, 128),
    Shape("Qwen2.5-72B", "down", 29568, 8192, 4, 128),
    Shape("Qwen2.5-72B", "q/o", 8192, 8192, 4, 128),
    Shape("Qwen2.5-72B", "k/v", 8192, 1024, 4, 128),
)

ALL = QWEN_2_5_72B + _llama_3_1_8b(4, 128) + _llama_3_1_8b(8, 128) + _llama_3_1_8b(4, None)
