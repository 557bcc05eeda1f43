"""Weights in E2M1, two a byte: MXFP4 and NVFP4.

Byte `b` of a row holds element `2b` in its low and `2b + 1` in its high half; scales belong to groups of columns.

MXFP4 has groups of 32 with a power of two, in E8M0 or its bits in U8:

* gpt-oss: `X_blocks` U8 `[experts, out, in / 32, 16]` and `X_scales` U8 `[experts, out, in / 32]`; the logical tensor
  `X` is `[experts, in, out]`.
* compressed-tensors `mxfp4-pack-quantized`: `X.weight_packed` U8 `[out, in / 2]`, `X.weight_scale` U8.
* DeepSeek-V4: `X.weight` I8 `[out, in / 2]`, or F4 `[out, in]`, and `X.scale` F8_E8M0. MiMo: `X.weight` U8.

NVFP4 has groups of 16 with an E4M3 scale, and an F32 factor for the whole tensor:

* compressed-tensors `nvfp4-pack-quantized`: `X.weight_packed` U8, `X.weight_scale` F8_E4M3, which are divided by
  `X.weight_global_scale`.
* ModelOpt: `X.weight` U8, `X.weight_scale` F8_E4M3, which are multiplied by `X.weight_scale_2`.
"""

from collections.abc import Mapping

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs import scales
from slicecast.convert.codecs.base import Part, StoredTensor
from slicecast.convert.codecs.grouped import GlobalScale, Grouped
from slicecast.convert.errors import MissingPartnerError, ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo

_MXFP4_GROUP = 32
_NVFP4_GROUP = 16
_BYTE = np.dtype(np.uint8)
_BITS = 4

# Partners that change what the weight means, and are not understood.
_REFUSED_PARTNERS = {
    "pre_quant_scale": "a scale of the activations that belongs into the weights (ModelOpt's AWQ)",
    "svdquant_lora_a": "a low-rank part of the weight (ModelOpt's NVFP4_SVD)",
}


def is_stored(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the weight `name`, of dtype I8 or U8, holds two codes a byte: by the dtype of its scale."""
    found = [tensors[candidate].dtype for candidate in scales.names_of(name) if candidate in tensors]
    if tensors[name].dtype == "U8":
        return found[:1] in (["U8"], ["F8_E8M0"], ["F8_E4M3"]) or f"{name}_scale_2" in tensors
    return found[:1] in (["U8"], ["F8_E8M0"])


def stored(name: str, weight: TensorInfo, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredTensor:
    """The logical tensor that a packed weight `[out, in]` and its scales are.

    Args:
        name: The name in the rules.
        weight: The packed tensor: `name` itself or `X.weight_packed`.
        shape: The logical shape.
        tensors: All tensors of the checkpoint.

    Raises:
        MissingPartnerError: If a scale is missing.
        ShapeError: If shapes disagree with each other or with `config.json`.
        UnsupportedFormatError: If a partner changes the weight in a way that is not supported.
    """
    base = name.removesuffix(".weight")
    for partner, meaning in _REFUSED_PARTNERS.items():
        if f"{base}.{partner}" in tensors:
            raise UnsupportedFormatError(
                f"{weight.file}: tensor '{weight.name}' has a partner '{base}.{partner}', {meaning}, which is not "
                "supported."
            )
    if len(shape) != 2:
        raise ShapeError(
            f"{weight.file}: tensor '{weight.name}' is packed, which has two axes, but config.json gives {list(shape)}."
        )
    out, columns = shape
    if weight.dtype == "F4":  # Headers give the number of elements, not of bytes.
        scales.check_shape(weight, ("F4",), shape, "that is the weight's shape by config.json")
    else:
        packed = scales.matrix_bytes(shape, _BITS)
        scales.check_shape(weight, ("U8", "I8"), packed, f"a weight of {list(shape)} has two values a byte")
    scale = scales.find(name, weight, tensors)
    factor, how = _global_scale(base, scale, tensors)
    group = _MXFP4_GROUP if how is None else _NVFP4_GROUP
    if columns % group:
        raise ShapeError(
            f"{weight.file}: tensor '{weight.name}' has {columns} columns, which are no groups of {group}."
        )
    dtypes = ("U8", "F8_E8M0") if how is None else ("F8_E4M3",)
    scales.check_shape(scale, dtypes, (out, columns // group), f"a weight of {list(shape)} has groups of {group}")
    codec = Grouped(
        description=f"{'mxfp4' if how is None else 'nvfp4'}, group {group}",
        code="e2m1",
        out=out,
        columns=columns,
        group_size=group,
        scale_format="e8m0" if how is None else "e4m3",
        global_scale=how,
    )
    parts = [Part(weight, _BYTE, scales.matrix_bytes(shape, _BITS)), Part(scale, _BYTE, scale.shape)]
    if factor is not None:
        parts.append(Part(factor, np.dtype(np.float32), (1,), axis=None))
    unread = (f"{base}.weight_shape",) if f"{base}.weight_shape" in tensors else ()
    return StoredTensor(name, shape, codec, tuple(parts), unread)


def stored_as_blocks(name: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredTensor:
    """The logical tensor `[experts, in, out]` that gpt-oss' blocks and scales are.

    Raises:
        MissingPartnerError: If the scales are missing.
        ShapeError: If shapes disagree with each other or with `config.json`.
    """
    blocks = tensors[f"{name}_blocks"]
    scale = tensors.get(f"{name}_scales")
    if scale is None:
        raise MissingPartnerError(
            f"{blocks.file}: tensor '{blocks.name}' is quantized, but its scales '{name}_scales' are in no file of the "
            "checkpoint. Download the missing file."
        )
    if len(shape) != 3 or shape[1] % _MXFP4_GROUP:
        raise ShapeError(
            f"{blocks.file}: tensor '{blocks.name}' is in blocks of {_MXFP4_GROUP} inputs of several experts, but "
            f"config.json gives '{name}' the shape {list(shape)}."
        )
    experts, columns, out = shape
    groups = columns // _MXFP4_GROUP
    why = f"'{name}' is {list(shape)} by config.json"
    scales.check_shape(blocks, ("U8",), (experts, out, groups, _MXFP4_GROUP * _BITS // 8), why)
    scales.check_shape(scale, ("U8",), (experts, out, groups), why)
    codec = Grouped(
        description=f"mxfp4, group {_MXFP4_GROUP}",
        code="e2m1",
        out=out,
        columns=columns,
        group_size=_MXFP4_GROUP,
        scale_format="e8m0",
        transposed=True,
    )
    parts = (Part(blocks, _BYTE, (experts, out, columns * _BITS // 8)), Part(scale, _BYTE, scale.shape))
    return StoredTensor(name, shape, codec, parts)


def _global_scale(
    base: str, scale: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> tuple[TensorInfo | None, GlobalScale | None]:
    """The factor of an NVFP4 tensor and what it does; nothing for MXFP4, which the scale's dtype tells."""
    if scale.dtype != "F8_E4M3":
        return None, None
    names: dict[str, GlobalScale] = {f"{base}.weight_global_scale": "divide", f"{base}.weight_scale_2": "multiply"}
    for name, how in names.items():
        factor = tensors.get(name)
        if factor is not None:
            if factor.dtype != "F32" or factor.shape not in ((), (1,)):
                raise ShapeError(
                    f"{factor.file}: tensor '{name}' is {factor.dtype}{list(factor.shape)}, expected one F32."
                )
            return factor, how
    raise MissingPartnerError(
        f"{scale.file}: tensor '{scale.name}' is a scale of NVFP4, which needs a second one for the whole tensor, but "
        f"{' or '.join(repr(name) for name in names)} is in no file of the checkpoint. Download the missing file."
    )
