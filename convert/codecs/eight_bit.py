"""Weights of one byte each: FP8 and INT8, with a scale for each block, row, or tensor.

`X.weight` F8_E4M3, F8_E5M2 or I8 `[out, in]` is multiplied by its scale (names in `scales.py`), which is F32, BF16 or
F16, or for MXFP8 and DeepSeek-V4 a power of two in F8_E8M0 or its bits in U8:

* `[ceil(out / rows), ceil(in / columns)]` for the announced block: 128 x 128 in DeepSeek-V3, Kimi-K2-Instruct, Qwen3
  and MiniMax-M2, 32 x 32 in DeepSeek-V4.1, 1 x 32 in MXFP8. The blocks at the edges may be smaller.
* `[out, 1]` or `[out]`: a scale a row (compressed-tensors, fbgemm).
* `[]`, `[1]` or `[1, 1]`: one scale (compressed-tensors, AutoFP8, ModelOpt).

INT8 may come with `X.weight_zero_point` I8 in the scale's shape. Several experts in one tensor have a leading axis.
"""

from collections.abc import Mapping

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs import scales
from slicecast.convert.codecs.base import Part, StoredTensor
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import MissingPartnerError, ShapeError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels.grouped import Code

_CODES: dict[str, Code] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "int8"}
_NAMES = {"F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "I8": "int8"}
DTYPES = tuple(_CODES)


def stored(
    name: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """The logical tensor that a weight of bytes and its scale are.

    Raises:
        MissingPartnerError: If the scale is missing, or the zero points where they are announced.
        ShapeError: If shapes disagree with each other, with `config.json`, or with the announced block size.
        UnsupportedFormatError: If the scale has a dtype that no format gives its scales.
    """
    weight = tensors[name]
    scale = scales.find(name, weight, tensors)
    scales.check_shape(weight, DTYPES, shape, "that is the weight's shape by config.json")
    if len(shape) not in (2, 3):
        raise ShapeError(f"{weight.file}: tensor '{name}' is {weight.dtype}{list(shape)}; quantized are matrices only.")
    blocks = scales.grid(scale, shape, quantization.block if quantization else None)
    *leading, out, columns = shape
    scale_part = scales.part(scale, blocks, tuple(leading))
    parts = [Part(weight, np.dtype(np.uint8), shape), scale_part]
    zero = tensors.get(f"{name}_zero_point") if weight.dtype == "I8" else None
    if zero is None and weight.dtype == "I8" and quantization is not None and quantization.asymmetric:
        raise MissingPartnerError(
            f"{weight.file}: tensor '{name}' is announced as asymmetric, but its zero points '{name}_zero_point' are "
            "in no file of the checkpoint. Download the missing file."
        )
    if zero is not None:
        scales.check_shape(zero, ("I8",), scale.shape, f"the scale '{scale.name}' has this shape")
        parts.append(Part(zero, np.dtype(np.int8), scale_part.shape, 0, scale_part.per_row))
    if blocks.shape == (1, 1):
        block = "one scale"
    elif blocks.columns == columns and blocks.rows == 1:
        block = "a scale a row"
    else:
        block = f"blocks of {blocks.rows} x {blocks.columns}"
    codec = Grouped(
        description=f"{_NAMES[weight.dtype]}, {block}",
        code=_CODES[weight.dtype],
        out=out,
        columns=columns,
        group_size=min(blocks.columns, columns),
        scale_format=scales.format_of(scale),
        rows_per_scale=blocks.rows,
        zero=None if zero is None else "bytes",
    )
    return StoredTensor(name, shape, codec, tuple(parts))
