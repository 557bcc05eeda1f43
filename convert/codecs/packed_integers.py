"""compressed-tensors `pack-quantized`: integers of 2 to 8 bits with a scale for each group of columns.

Format, as the compressed-tensors library writes it, for a logical weight `[out, in]` called `X.weight`:

* `X.weight_packed` I32 `[out, words]`: the values of a row, each plus `2**(bits - 1)`, in little-endian words. With 4
  bits, byte `b` of a row holds element `2b` in its low and `2b + 1` in its high half. Widths that do not divide a word
  cross words since version 0.18 of the library; before, the last bits of each word stayed unused.
* `X.weight_scale` BF16, F16 or F32 `[out, in / group_size]`, or `[out, 1]` for one scale a row.
* `X.weight_zero_point` I32 `[words, groups]`, if asymmetric: packed like the values, but along the rows.
* `X.weight_shape` I32 or I64 `[2]`: `[out, in]`, which `config.json` says too.

`W[r, c] = (value(r, c) - zero(r, c // group_size)) * scale[r, c // group_size]`.
"""

from collections.abc import Mapping

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor, group_name
from slicecast.convert.codecs.bit_stream import Packing
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import MissingPartnerError, ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.grouped import Code

_BYTES_PER_WORD = 4

# Widths that the kernel takes as they are stored. The host unpacks the others to signed bytes.
_CODES: dict[int, Code] = {4: "int4_offset", 8: "int8_offset"}


def stored(
    base: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """The logical tensor that a packed tensor and its partners are.

    Raises:
        UnsupportedFormatError: If no config says how many bits the values have, or the columns are reordered.
        MissingPartnerError: If the scale is missing, or the zero points where they are announced.
        ShapeError: If the shapes of the partners disagree with each other or with `config.json`.
    """
    packed = tensors[f"{base}.weight_packed"]
    where = f"{packed.file}: tensor '{packed.name}'"
    if quantization is None or not quantization.bits:
        raise UnsupportedFormatError(
            f"{where} looks like compressed-tensors' packed integers, but config.json has no quantization_config that "
            "says how many bits they have. Use the config.json that was published with the weights."
        )
    if f"{base}.weight_g_idx" in tensors:
        raise UnsupportedFormatError(
            f"{where} has a partner '{base}.weight_g_idx': packed integers with reordered columns are not supported."
        )
    scale = tensors.get(f"{base}.weight_scale")
    if scale is None:
        raise MissingPartnerError(
            f"{where} is quantized, but its scale '{base}.weight_scale' is in no file of the checkpoint. "
            "Download the missing file; the weight has no value without its scale."
        )
    if len(shape) != 2:
        raise ShapeError(f"{where} is packed, which has two axes, but config.json gives {list(shape)}.")
    rows, columns = shape
    packing = _packing(packed, shape, quantization)
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if scale.dtype not in FLOAT_DTYPES or scale.shape[:1] != (rows,) or groups == 0 or columns % groups:
        raise ShapeError(
            f"{scale.file}: tensor '{scale.name}' is {scale.dtype}{list(scale.shape)}; a scale for a weight of "
            f"{list(shape)} is BF16, F16 or F32 [{rows}, groups] with groups a divisor of {columns}."
        )
    group_size = columns // groups
    if groups > 1 and quantization.group_sizes and group_size not in quantization.group_sizes:
        raise ShapeError(
            f"{scale.file}: tensor '{scale.name}' has {groups} scales for {columns} columns, a group size of "
            f"{group_size}, but the quantization_config says {_either(quantization.group_sizes)}."
        )
    group = group_name(group_size, columns)
    parts = [
        Part(packed, np.dtype(np.uint8), (rows, packed.shape[1] * _BYTES_PER_WORD)),
        Part(scale, FLOAT_DTYPES[scale.dtype], (rows, groups)),
    ]
    zero = tensors.get(f"{base}.weight_zero_point")
    if zero is None and quantization.asymmetric:
        raise MissingPartnerError(
            f"{where} is announced as asymmetric, but its zero points '{base}.weight_zero_point' are in no file of the "
            "checkpoint. Download the missing file."
        )
    if zero is not None:
        if zero.dtype != "I32" or zero.shape != (packing.words(rows), groups):
            raise ShapeError(
                f"{zero.file}: tensor '{zero.name}' is {zero.dtype}{list(zero.shape)}; the zero points for a weight of "
                f"{list(shape)} with {groups} groups are I32[{packing.words(rows)}, {groups}]."
            )
        parts.append(Part(zero, np.dtype(np.int32), zero.shape, 0, packing.words_per_code))
    bits = packing.bits
    codec = Grouped(
        description=f"int{bits} pack-quantized, {group}{', asymmetric' if zero is not None else ''}",
        code=_CODES.get(bits, "int8"),
        out=rows,
        columns=columns,
        group_size=group_size,
        zero=None if zero is None else packing,
        packing=None if bits in _CODES else packing,
    )
    unread = (f"{base}.weight_shape",) if f"{base}.weight_shape" in tensors else ()
    return StoredTensor(f"{base}.weight", shape, codec, tuple(parts), unread)


def _packing(packed: TensorInfo, shape: Shape, quantization: QuantizationConfig) -> Packing:
    """How the values are packed: the announced width that gives the stored number of words."""
    rows, columns = shape
    candidates = [
        Packing(bits, 1 << (bits - 1), dense) for bits in sorted(quantization.bits) for dense in (True, False)
    ]
    if packed.dtype == "I32":
        for packing in candidates:
            if packed.shape == (rows, packing.words(columns)):
                return packing
    words = dict.fromkeys(f"I32[{rows}, {packing.words(columns)}]" for packing in candidates)
    raise ShapeError(
        f"{packed.file}: tensor '{packed.name}' is {packed.dtype}{list(packed.shape)}, but a weight of {list(shape)} "
        f"(from config.json) packs into {' or '.join(words)} with {_either(quantization.bits)} bits. Use the "
        "config.json that was published with the weights."
    )


def _either(values: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(values)))
