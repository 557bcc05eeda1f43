"""FP8 checkpoints that stay FP8: codes and block scales become leaves of their own, for MaxText's `*-fp8` models.

A weight `[out, in]` that has a scale for each block of 128 by 128 is laid out twice: its codes as any weight, into the
leaf of that name, and its scales `[out / 128, in / 128]` in the same way, into a leaf called `..._scale`. What moves
whole blocks is the same for both, so the rule for the scales follows from the rule for the weight.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs import joined, plain
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor
from slicecast.convert.codecs.constant import Constant
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.codecs.joined import Joined
from slicecast.convert.errors import UnsupportedFormatError
from slicecast.convert.mapping.ops import Op, Slice, Split, Transpose
from slicecast.convert.mapping.rules import Rule
from slicecast.convert.mapping.target import FP8, Leaf

# Scales are published in bfloat16 or float32; float32 has both.
_SCALE_DTYPE = "float32"


# The tensors of a leaf by stack coordinate.
Sources = dict[Shape, StoredTensor]


def keep(leaf: Leaf, sources: Sources) -> list[tuple[Leaf, Sources]] | None:
    """The leaves of codes and of scales, for one whose tensors are FP8 in blocks; None if none of them is quantized.

    Raises:
        UnsupportedFormatError: If they are quantized in another way, or not alike, or heads are no whole blocks.
    """
    blocks = {_block(tensor) for tensor in sources.values()}
    if blocks == {None}:
        return None
    block = blocks.pop()
    if blocks or block is None or block == 0:
        raise UnsupportedFormatError(
            f"leaf '{leaf.path}': --save_dtype={FP8} keeps weights that are FP8 (E4M3) with one scale for each square "
            "block, in all layers; these are stored in another way. Use --save_dtype=bfloat16."
        )
    scales = replace(leaf, path=f"{leaf.path}_scale", rule=_scale_rule(leaf, block), dtype=_SCALE_DTYPE)
    return [
        (replace(leaf, dtype=FP8), {coordinate: _codes(tensor) for coordinate, tensor in sources.items()}),
        (scales, {coordinate: _scales(tensor, block) for coordinate, tensor in sources.items()}),
    ]


def _block(tensor: StoredTensor) -> int | None:
    """The side of the blocks of an FP8 tensor; None if it is not quantized, 0 if it is in another way."""
    codec = tensor.codec
    if isinstance(codec, Joined):
        found = {_block(member) for member in joined.member_tensors(tensor)}
        return found.pop() if len(found) == 1 else 0
    if isinstance(codec, (plain.Plain, plain.Integers, Constant)):
        return None
    # Scales that are powers of two have bytes of their own, and several experts in one tensor an axis without blocks.
    if not isinstance(codec, Grouped) or codec.scale_format != "float" or len(tensor.shape) != 2:
        return 0
    return codec.group_size if codec.code == "e4m3" and codec.rows_per_scale == codec.group_size else 0


def _codes(tensor: StoredTensor) -> StoredTensor:
    if isinstance(tensor.codec, Joined):
        members = [_codes(member) for member in joined.member_tensors(tensor)]
        return joined.stored(tensor.name, tensor.shape, members, tensor.codec.takes, tensor.codec.groups)
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    return StoredTensor(
        tensor.name, tensor.shape, plain.Plain(dtype.name), (Part(tensor.parts[0].tensor, dtype, tensor.shape),)
    )


def _scales(tensor: StoredTensor, block: int) -> StoredTensor:
    shape = _blocks(tensor.shape, block, tensor.name)
    if isinstance(tensor.codec, Joined):
        members = [_scales(member, block) for member in joined.member_tensors(tensor)]
        groups = tensor.codec.groups
        takes = []
        for member, start, stop in tensor.codec.takes:
            # What is taken in each turn must be whole blocks too.
            first, share = _blocks((start, (stop - start) // groups), block, tensor.name)
            takes.append((member, first, first + share * groups))
        return joined.stored(tensor.name, shape, members, tuple(takes), groups)
    scale = tensor.parts[1].tensor
    if scale.dtype not in FLOAT_DTYPES:
        raise UnsupportedFormatError(
            f"{scale.file}: tensor '{scale.name}' is {scale.dtype}; MaxText's FP8 models have plain numbers as scales. "
            "Use --save_dtype=bfloat16."
        )
    dtype = FLOAT_DTYPES[scale.dtype]
    return StoredTensor(scale.name, shape, plain.Plain(dtype.name), (Part(scale, dtype, shape),))


def _scale_rule(leaf: Leaf, block: int) -> Rule:
    """The rule of a leaf, for blocks in the place of elements."""
    rule = leaf.rule
    ops: list[Op] = []
    for op in rule.ops:
        match op:
            case Transpose():
                ops.append(op)
            case Split(axis, sizes):
                ops.append(Split(axis, (*sizes[:-1], *_blocks(sizes[-1:], block, leaf.path))))
            case Slice(axis, start, stop):
                start, stop = _blocks((start, stop), block, leaf.path)
                ops.append(Slice(axis, start, stop))
            case _:
                raise UnsupportedFormatError(
                    f"leaf '{leaf.path}': {op} takes blocks of {block} x {block} apart, so that they cannot stay FP8. "
                    "Use --save_dtype=bfloat16."
                )
    return replace(rule, shape=_blocks(rule.shape, block, leaf.path), ops=tuple(ops))


def _blocks(sizes: Shape, block: int, name: str) -> Shape:
    """Sizes in blocks."""
    if any(size % block for size in sizes):
        raise UnsupportedFormatError(
            f"'{name}': {list(sizes)} are no whole blocks of {block}, and MaxText has no others for weights that stay "
            "FP8. Use --save_dtype=bfloat16."
        )
    return tuple(size // block for size in sizes)
