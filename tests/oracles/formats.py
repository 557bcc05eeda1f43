"""What the oracles share: a format, as its own library writes and reads it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Quantized:
    """A weight as a library stores it, and what the library makes of that again.

    Attributes:
        tensors: What is stored, by what follows the module's name and a dot: `weight_packed`.
        weight: The library's own dequantization, in the shape of the weight: float32 and unrounded where the library
            can compute that, bfloat16 where it cannot.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor


# A weight in float32 and a source of further random numbers.
Quantize = Callable[[Tensor, torch.Generator], Quantized]


@dataclass(frozen=True)
class Format:
    """A format in the hands of a library.

    Attributes:
        name: The format's name in the tests.
        config: What `config.json` says about it.
        quantize: What the library stores for a weight.
        shapes: Shapes that the format takes, among them the raggedest: `[out, in]`, or what else the format stores.
        parameter: What the logical tensor is called in its module.
        zeros_have_signs: False if the library makes every zero positive.
    """

    name: str
    config: Mapping[str, Any]
    quantize: Quantize
    shapes: tuple[Shape, ...]
    parameter: str = "weight"
    zeros_have_signs: bool = True


def random_weight(shape: Shape, random: torch.Generator) -> Tensor:
    """A weight with rows of different size and a few outliers, in float32.

    The values are those of bfloat16, as those of a model that somebody quantizes.
    """
    weight = torch.randn(shape, generator=random) * torch.rand((*shape[:-1], 1), generator=random)
    outliers = torch.rand(shape, generator=random) < 0.01
    return torch.where(outliers, 8 * weight, weight).mul(0.1).bfloat16().float()


def random_integers(low: int, high: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Integers from `low` to `high`, without the latter, in int32."""
    return torch.randint(low, high, shape, generator=random).to(torch.int32)


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Writes a checkpoint with the library's own writer of safetensors files."""
    directory.mkdir(parents=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory
