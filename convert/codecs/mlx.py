"""MLX's affine quantization. Rare as a source for training, so the host decodes it, in NumPy.

For a logical weight `[out, in]` called `X.weight`:

* `X.weight` U32 `[out, in * bits / 32]`: a little-endian bit stream of unsigned codes for each row.
* `X.scales` and `X.biases` BF16, F16 or F32 `[out, in / group_size]`.

`W[r, c] = code(r, c) * scale[r, c // group_size] + bias[r, c // group_size]`, in float32 with two roundings. The chips
do not do it, because compilers may fuse the two operations into one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import FLOAT_DTYPES, Part, StoredTensor, ValuesCodec
from slicecast.convert.codecs.bit_stream import Packing, unpack
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.codecs.scales import check_shape, partner
from slicecast.convert.errors import ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class MlxAffine(ValuesCodec):
    """Unsigned codes with a scale and a bias for each group. Parts: words, scales, biases.

    Attributes:
        bits: The width of a code.
        columns: The logical number of columns.
        group_size: How many columns share a scale and a bias.
    """

    changes_values: ClassVar[bool] = True

    bits: int
    columns: int
    group_size: int

    @property
    def description(self) -> str:
        """The format, its width and its group size."""
        return f"mlx affine int{self.bits}, group {self.group_size}"

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The values, `float32[rows, columns]`, computed row by row to bound what NumPy holds beside them."""
        words, scales, biases = parts
        values = np.empty((stop - start, self.columns), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # Of what such a checkpoint holds, nothing is hidden.
            for row, target in enumerate(values):
                codes = unpack(words[row : row + 1], 0, self.columns, Packing(self.bits)).view(np.uint8)
                grouped = codes.reshape(-1, self.group_size).astype(np.float32)
                scale, bias = (x[row].astype(np.float32)[:, np.newaxis] for x in (scales, biases))
                target[:] = (grouped * scale + bias).reshape(-1)
        return (values,)

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """float32 values."""
        return rows * self.columns * np.dtype(np.float32).itemsize


def stored(
    name: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """The logical tensor that a packed weight, its scales and its biases are.

    Raises:
        MissingPartnerError: If scales or biases are missing.
        ShapeError: If shapes disagree with each other, with `config.json`, or with the announcement.
        UnsupportedFormatError: If nothing announces MLX.
    """
    words, base = tensors[name], name.removesuffix(".weight")
    if quantization is None or quantization.method != "mlx":
        raise UnsupportedFormatError(
            f"{words.file}: tensor '{name}' is stored as U32, as MLX packs integers, but config.json has no "
            "'quantization' that says so. Use the config.json that was published with the weights."
        )
    scales, biases = (partner(f"{base}.{name}", words, tensors) for name in ("scales", "biases"))
    if len(shape) != 2:
        raise ShapeError(
            f"{words.file}: tensor '{name}' is packed, which has two axes, but config.json gives {list(shape)}."
        )
    rows, columns = shape
    for bits in sorted(quantization.bits):
        for group_size in sorted(quantization.group_sizes):
            packing = Packing(bits)
            groups = (rows, columns // group_size) if columns % group_size == 0 else ()
            if words.shape == (rows, packing.words(columns)) and scales.shape == groups:
                check_shape(scales, tuple(FLOAT_DTYPES), groups, f"'{name}' has groups of {group_size}")
                check_shape(biases, tuple(FLOAT_DTYPES), groups, f"'{name}' has groups of {group_size}")
                parts = (
                    Part(words, np.dtype(np.uint32), words.shape),
                    Part(scales, FLOAT_DTYPES[scales.dtype], groups),
                    Part(biases, FLOAT_DTYPES[biases.dtype], groups),
                )
                return StoredTensor(name, shape, MlxAffine(bits, columns, group_size), parts)
    announced = f"{sorted(quantization.bits)} bits and groups of {sorted(quantization.group_sizes)}"
    raise ShapeError(
        f"{words.file}: tensors '{name}' {words.dtype}{list(words.shape)} and '{scales.name}' "
        f"{scales.dtype}{list(scales.shape)} do not store a weight of {list(shape)} (from config.json) with "
        f"{announced} (from its quantization). Use the config.json that was published with the weights."
    )
