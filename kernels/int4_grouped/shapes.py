"""Shapes of real models, for tests and measurements."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One quantized weight of a real model.

    Attributes:
      model: The checkpoint it comes from.
      weight: The projections of this shape.
      rows: Output features.
      columns: Input features.
      group_size: Elements of a row that share a scale; equal to `columns` for the channel strategy.
    """

    model: str
    weight: str
    rows: int
    columns: int
    group_size: int

    def __str__(self) -> str:
        """A name that is readable in test ids and tables."""
        return f"{self.model} {self.weight} [{self.rows}, {self.columns}] g{self.group_size}"


KIMI_K2 = (
    Shape("Kimi-K2", "expert gate/up", 2048, 7168, 32),
    Shape("Kimi-K2", "expert down", 7168, 2048, 32),
)

LLAMA_3_1_8B_W4A16 = (
    Shape("Llama-3.1-8B w4a16", "gate/up", 14336, 4096, 128),
    Shape("Llama-3.1-8B w4a16", "down", 4096, 14336, 128),
    Shape("Llama-3.1-8B w4a16", "q/o", 4096, 4096, 128),
    Shape("Llama-3.1-8B w4a16", "k/v", 1024, 4096, 128),
)

LLAMA_3_1_8B_CHANNEL = (
    Shape("Llama-3.1-8B channel", "gate/up", 14336, 4096, 4096),
    Shape("Llama-3.1-8B channel", "down", 4096, 14336, 14336),
)

ALL = KIMI_K2 + LLAMA_3_1_8B_W4A16 + LLAMA_3_1_8B_CHANNEL
