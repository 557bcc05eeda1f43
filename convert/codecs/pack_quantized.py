"""compressed-tensors `pack-quantized`: symmetric INT4 weights with a scale for each group of columns.

Format, as the compressed-tensors library writes it, for a logical weight `[out, in]` called `X.weight`:

* `X.weight_packed` I32 `[out, ceil(in / 8)]`: eight values a word, the first in the lowest four bits, each stored as
  value plus 8. Read as bytes, byte `b` of a row holds element `2b` in its low and `2b + 1` in its high half.
* `X.weight_scale` BF16, F16 or F32 `[out, in / group_size]`, or `[out, 1]` for one scale a row.
* `X.weight_shape` I32 or I64 `[2]`: `[out, in]`, which `config.json` says too.

`W[r, c] = (stored(r, c) - 8) * scale[r, c // group_size]`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import MissingPartnerError, ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.kernels import int4_grouped
from slicecast.kernels.int4_grouped import Implementation

_VALUES_PER_WORD = 8
_BYTES_PER_WORD = 4


@dataclass(frozen=True, slots=True)
class PackQuantizedInt4:
    """Symmetric INT4 with a scale for each group of columns.

    Attributes:
        columns: The logical number of columns; rows are padded to whole words.
        group_size: How many columns share a scale.
    """

    columns: int
    group_size: int

    @property
    def description(self) -> str:
        """The format and its group size."""
        group = "channel" if self.group_size >= self.columns else f"group {self.group_size}"
        return f"int4 pack-quantized, {group}"

    @property
    def changes_values(self) -> bool:
        """Always."""
        return True

    def decode(
        self,
        parts: Sequence[jax.Array],
        *,
        dtype: DTypeLike,
        transposed: bool,
        implementation: Implementation = "auto",
    ) -> jax.Array:
        """Parts are the packed words as bytes, `uint8[batch, rows, bytes]`, and `scale[batch, rows, groups]`."""
        packed, scale = parts
        # The last group may end within the last word, but the kernel takes whole groups: pad to where both end.
        missing = -packed.shape[2] % (math.lcm(2, self.group_size) // 2)
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing)))
        scale = jnp.pad(scale, ((0, 0), (0, 0), (0, 2 * packed.shape[2] // self.group_size - scale.shape[2])))
        x = int4_grouped.dequantize(
            packed, scale, group_size=self.group_size, dtype=dtype, implementation=implementation
        )[:, : self.columns]
        return x if transposed else x.swapaxes(1, 2)


def is_packed(base: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether `X.weight` is stored in this format, `base` being `X`."""
    return f"{base}.weight_packed" in tensors


def stored(
    base: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """The logical tensor that a packed tensor and its partners are.

    Raises:
        UnsupportedFormatError: If the values are not symmetric INT4, or no config says that they are.
        MissingPartnerError: If the scale is missing.
        ShapeError: If the shapes of the partners disagree with each other or with `config.json`.
    """
    packed = tensors[f"{base}.weight_packed"]
    where = f"{packed.file}: tensor '{packed.name}'"
    _check_format(where, base, tensors, quantization)
    scale = tensors.get(f"{base}.weight_scale")
    if scale is None:
        raise MissingPartnerError(
            f"{where} is quantized, but its scale '{base}.weight_scale' is in no file of the checkpoint. "
            "Download the missing file; the weight has no value without its scale."
        )
    if len(shape) != 2:
        raise ShapeError(f"{where} is packed INT4, which has two axes, but config.json gives {list(shape)}.")
    rows, columns = shape
    words = -(-columns // _VALUES_PER_WORD)
    if packed.shape != (rows, words) or packed.dtype != "I32":
        raise ShapeError(
            f"{where} is {packed.dtype}{list(packed.shape)}, but a weight of {list(shape)} (from config.json) packs "
            f"into I32[{rows}, {words}]. Use the config.json that was published with the weights."
        )
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if scale.dtype not in FLOAT_DTYPES or scale.shape[:1] != (rows,) or groups == 0 or columns % groups:
        raise ShapeError(
            f"{scale.file}: tensor '{scale.name}' is {scale.dtype}{list(scale.shape)}; a scale for a weight of "
            f"{list(shape)} is BF16, F16 or F32 [{rows}, groups] with groups a divisor of {columns}."
        )
    group_size = columns // groups
    announced = quantization.group_size if quantization else None
    if groups > 1 and announced is not None and announced != group_size:
        raise ShapeError(
            f"{scale.file}: tensor '{scale.name}' has {groups} scales for {columns} columns, a group size of "
            f"{group_size}, but the quantization_config says {announced}."
        )
    padded = words * _VALUES_PER_WORD
    codec = PackQuantizedInt4(columns, padded if groups == 1 else group_size)
    parts = (
        Part(packed, np.dtype(np.uint8), (rows, words * _BYTES_PER_WORD)),
        Part(scale, FLOAT_DTYPES[scale.dtype], (rows, groups)),
    )
    unread = (f"{base}.weight_shape",) if f"{base}.weight_shape" in tensors else ()
    return StoredTensor(f"{base}.weight", shape, codec, parts, unread)


def _check_format(
    where: str, base: str, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> None:
    if quantization is None:
        raise UnsupportedFormatError(
            f"{where} looks like compressed-tensors INT4, but config.json has no quantization_config that says so. "
            "Use the config.json that was published with the weights."
        )
    if quantization.refusal is not None:
        raise UnsupportedFormatError(f"{where} is stored as {quantization.refusal}, which is not supported yet.")
    for partner in ("weight_zero_point", "weight_g_idx"):
        if f"{base}.{partner}" in tensors:
            raise UnsupportedFormatError(
                f"{where} has a partner '{base}.{partner}': asymmetric or reordered INT4 is not supported yet."
            )
