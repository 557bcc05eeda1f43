"""Scales of row-major weights: what they are called, and which block of the weight each of them belongs to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part
from slicecast.convert.errors import MissingPartnerError, ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.grouped import ScaleFormat

_WEIGHT = ".weight"

# What follows the module's name in the name of a weight's scale: DeepSeek and Qwen (a multiplier, whatever `inv` says);
# compressed-tensors, ModelOpt, fbgemm and AutoFP8; DeepSeek-V4; Mistral.
_NAMES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
# Experts in one tensor have no `.weight`: `experts.gate_up_proj` and `experts.gate_up_proj_scale`.
_NAMES_WITHOUT_WEIGHT = ("_scale_inv", "_scale")

_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of a matrix that share a scale.

    Attributes:
        rows: Rows of a block.
        columns: Columns of a block.
        shape: How many blocks there are along each axis.
    """

    rows: int
    columns: int
    shape: tuple[int, int]


def find(name: str, weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """The scale of the quantized weight `name`, which is stored as `weight`.

    Raises:
        MissingPartnerError: If there is none.
    """
    names = names_of(name)
    found = next((tensors[candidate] for candidate in names if candidate in tensors), None)
    if found is None:
        raise MissingPartnerError(
            f"{weight.file}: tensor '{weight.name}' is {weight.dtype}, which has no value without a scale, but its "
            f"scale ({' or '.join(repr(candidate) for candidate in names)}) is in no file of the checkpoint. Download "
            "the missing file."
        )
    return found


def partner(name: str, weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """The tensor `name`, without which the quantized tensor `weight` has no value.

    Raises:
        MissingPartnerError: If it is not there.
    """
    found = tensors.get(name)
    if found is None:
        raise MissingPartnerError(
            f"{weight.file}: tensor '{weight.name}' is quantized, but '{name}' is in no file of the checkpoint. "
            "Download the missing file; the weight has no value without it."
        )
    return found


def names_of(name: str) -> list[str]:
    """The names that the scale of the weight `name` may have."""
    if name.endswith(_WEIGHT):
        return [name.removesuffix(_WEIGHT) + suffix for suffix in _NAMES]
    return [name + suffix for suffix in _NAMES_WITHOUT_WEIGHT]


def grid(scale: TensorInfo, shape: Shape, block: tuple[int, int] | None) -> Grid:
    """Which block of a weight each value of its scale belongs to, by the scale's shape.

    Args:
        scale: The scale.
        shape: The logical shape of the weight, `[..., out, in]`.
        block: The announced block size. A shape alone does not give it: the blocks at the edges may be smaller.

    Raises:
        ShapeError: If the scale has none of the shapes that scales of this weight have.
    """
    *leading, rows, columns = shape
    candidates: list[Grid] = []
    if block is not None:
        # Also in blocks of a single row, which DeepSeek-V4.1 has beside its square ones.
        for block_rows, block_columns in (block, (1, block[1])):
            candidates.append(Grid(block_rows, block_columns, (-(-rows // block_rows), -(-columns // block_columns))))
    candidates += [Grid(1, columns, (rows, 1)), Grid(rows, columns, (1, 1))]
    for candidate in candidates:
        # Axes of size one at the end may be missing; and ModelOpt keeps axes of size one within blocks.
        counts = candidate.shape
        spellings = ((*leading, *counts), (*leading, counts[0], 1, counts[1], 1))
        if any(_without_last_ones(scale.shape) == _without_last_ones(spelling) for spelling in spellings):
            return candidate
    shapes = [str([*leading, *candidate.shape]) for candidate in candidates]
    raise ShapeError(
        f"{scale.file}: tensor '{scale.name}' is {scale.dtype}{list(scale.shape)}; the scale of a weight of "
        f"{list(shape)} is {' or '.join(dict.fromkeys(shapes))}"
        f"{'' if block is None else f' (blocks of {block[0]} x {block[1]}, says the quantization_config)'}. "
        "Use the config.json that was published with the weights."
    )


def _without_last_ones(shape: Shape) -> Shape:
    return _without_last_ones(shape[:-1]) if shape[-1:] == (1,) else shape


def part(scale: TensorInfo, blocks: Grid, leading: Shape) -> Part:
    """The scale as a part, `[..., scale rows, groups]`."""
    dtype = FLOAT_DTYPES.get(scale.dtype, _BYTE)
    per_row = Fraction(1) if leading or blocks.rows == 1 else Fraction(1, blocks.rows)
    return Part(scale, dtype, (*leading, *blocks.shape), 0, per_row)


def format_of(scale: TensorInfo) -> ScaleFormat:
    """How a scale of one factor is stored. Bytes are the bits of E8M0, never numbers.

    Raises:
        UnsupportedFormatError: If it has a dtype that no format gives its scales.
    """
    if scale.dtype in FLOAT_DTYPES:
        return "float"
    if scale.dtype in ("F8_E8M0", "U8"):
        return "e8m0"
    raise UnsupportedFormatError(
        f"{scale.file}: tensor '{scale.name}' is a scale stored as {scale.dtype}{list(scale.shape)}; scales of this "
        f"format are {', '.join(FLOAT_DTYPES)}, F8_E8M0 or U8."
    )


def check_shape(tensor: TensorInfo, dtypes: tuple[str, ...], expected: Shape, why: str) -> None:
    """Checks a stored part against what follows from the logical shape.

    Raises:
        ShapeError: If its dtype or shape is another one; `why` ends the first sentence.
    """
    if tensor.dtype not in dtypes or tensor.shape != expected:
        raise ShapeError(
            f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}{list(tensor.shape)}, but {' or '.join(dtypes)}"
            f"{list(expected)} is expected: {why}. Use the config.json that was published with the weights."
        )


def matrix_bytes(shape: Shape, bits: int) -> Shape:
    """The shape of a row-major tensor of `bits`-bit codes, viewed as bytes."""
    return (*shape[:-1], math.ceil(shape[-1] * bits / 8))
