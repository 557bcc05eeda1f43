"""bitsandbytes NF4 and FP4, nested or not. Rare enough that the host decodes it, in NumPy.

For a logical weight `[out, in]` called `X.weight`, of which everything is stored flat, row after row:

* `X.weight` U8 `[out * in / 2, 1]`: two codes a byte, the first in the high half.
* `X.weight.quant_map` F32 `[16]`: the value of each code.
* `X.weight.absmax` F32 `[blocks]`: a factor for each block of the flat array, which may cross rows. Nested, it is U8,
  and `absmax[b] = nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset`, with
  `X.weight.nested_quant_map` F32 `[256]` and `X.weight.nested_absmax` F32.
* `X.weight.quant_state.bitsandbytes__nf4` or `__fp4` U8: JSON with the sizes and `nested_offset`.

`W[i] = quant_map[code[i]] * absmax[i // blocksize]`, in float32.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from reprlib import repr as clip  # Cuts long values to a length that suits a message.
from typing import Any, ClassVar

import numpy as np

from slicecast.convert.box import Shape
from slicecast.convert.codecs.base import Part, StoredTensor, ValuesCodec
from slicecast.convert.codecs.scales import check_shape, partner
from slicecast.convert.errors import ShapeError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo

_STATE = ".quant_state.bitsandbytes__"

# The block sizes that the library offers.
_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)
_NESTED_BLOCK = 256

# Values decoded at once, to bound what NumPy holds for the intermediate steps: a few MB.
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class BitsAndBytes4Bit(ValuesCodec):
    """NF4 or FP4. Parts: codes, absmax, map, state, and if nested the nested map and absmax.

    Attributes:
        kind: `nf4` or `fp4`.
        shape: The logical shape.
        block_size: Values that share a factor.
        nested: Whether the factors are quantized too.
    """

    changes_values: ClassVar[bool] = True

    kind: str
    shape: Shape
    block_size: int
    nested: bool

    @property
    def description(self) -> str:
        """The format and its block size."""
        return f"bitsandbytes {self.kind}, blocks of {self.block_size}{', nested' if self.nested else ''}"

    def prepare(self, parts: Sequence[np.ndarray], start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The values, `float32[rows, columns]`.

        Raises:
            UnsupportedFormatError: If the stored state says something else than the shapes.
        """
        codes, absmax, quant_map, state, *nested = parts
        offset = self._offset(state)
        first, last = start * self.shape[1], stop * self.shape[1]
        first_block = first // self.block_size
        values = np.empty(last - first, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # A damaged factor gives what float32 arithmetic gives.
            if self.nested:
                nested_map, nested_absmax = nested
                blocks = np.arange(first_block, first_block + len(absmax))
                # Two roundings, in the order of the library.
                absmax = nested_map[absmax] * nested_absmax[blocks // _NESTED_BLOCK] + offset
            for begin in range(first, last, _VALUES_AT_ONCE):
                index = np.arange(begin, min(begin + _VALUES_AT_ONCE, last))
                code = codes[index // 2 - first // 2] >> np.where(index % 2, 0, 4).astype(np.uint8) & np.uint8(15)
                values[index - first] = quant_map[code] * absmax[index // self.block_size - first_block]
        return (values.reshape(-1, self.shape[1]),)

    def _offset(self, state: np.ndarray) -> np.float32:
        """The offset of nested factors, from the stored JSON, which must agree with the shapes."""
        expected: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block_size,
            "shape": list(self.shape),
        }
        if self.nested:
            expected["nested_blocksize"] = _NESTED_BLOCK
        try:
            content: Any = json.loads(state.tobytes())
            found = {key: content[key] for key in expected}
            offset: Any = content["nested_offset"] if self.nested else 0.0
            if type(offset) not in (float, int):
                raise TypeError(f"nested_offset is {clip(offset)}")
            with np.errstate(over="ignore"):
                value = np.float32(float(offset))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UnsupportedFormatError(
                f"has a partner '{_STATE}{self.kind}' that is not the JSON that bitsandbytes writes ({error!r}). "
                "Download the checkpoint again."
            ) from None
        if found != expected:
            raise UnsupportedFormatError(
                f"has a partner '{_STATE}{self.kind}' that says {clip(found)}, but the stored shapes and config.json "
                f"say {expected}. Use the config.json that was published with the weights."
            )
        return value

    def prepared_bytes(self, parts: Sequence[Part], rows: int) -> int:
        """float32 values."""
        return rows * self.shape[1] * np.dtype(np.float32).itemsize


def state_of(name: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The stored state of the weight `name`, if it is in this format."""
    return next((tensors[f"{name}{_STATE}{k}"] for k in ("nf4", "fp4") if f"{name}{_STATE}{k}" in tensors), None)


def stored(name: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredTensor:
    """The logical tensor that a 4-bit weight and its state are.

    Raises:
        MissingPartnerError: If a partner is missing.
        ShapeError: If shapes disagree with each other or with `config.json`.
    """
    weight, state = tensors[name], state_of(name, tensors)
    assert state is not None, "the caller found the state"
    absmax = partner(f"{name}.absmax", weight, tensors)
    nested = absmax.dtype == "U8"
    values = math.prod(shape)
    why = f"'{name}' is {list(shape)} by config.json"
    if len(shape) != 2:
        raise ShapeError(
            f"{weight.file}: tensor '{name}' is 4-bit, which has two axes, but config.json gives {list(shape)}."
        )
    check_shape(weight, ("U8",), (-(-values // 2), 1), why)
    block = next((size for size in _BLOCK_SIZES if absmax.shape == (-(-values // size),)), None)
    if block is None:
        raise ShapeError(
            f"{absmax.file}: tensor '{absmax.name}' is {absmax.dtype}{list(absmax.shape)}; a weight of {list(shape)} "
            f"has a factor for each block of {', '.join(map(str, sorted(_BLOCK_SIZES)))} values."
        )
    quant_map = partner(f"{name}.quant_map", weight, tensors)
    check_shape(absmax, ("U8",) if nested else ("F32",), absmax.shape, "that is how factors are stored")
    check_shape(quant_map, ("F32",), (16,), "there are 16 codes")
    check_shape(state, ("U8",), state.shape, "it is text")
    float32, byte = np.dtype(np.float32), np.dtype(np.uint8)
    parts = [
        Part(weight, byte, (-(-values // 2),), 0, Fraction(shape[1], 2)),
        Part(absmax, byte if nested else float32, absmax.shape, 0, Fraction(shape[1], block)),
        Part(quant_map, float32, (16,), None),
        Part(state, byte, (state.nbytes,), None),
    ]
    if nested:
        nested_map = partner(f"{name}.nested_quant_map", weight, tensors)
        factors = partner(f"{name}.nested_absmax", weight, tensors)
        check_shape(nested_map, ("F32",), (256,), "there are 256 codes")
        check_shape(factors, ("F32",), (-(-absmax.shape[0] // _NESTED_BLOCK),), f"blocks of {_NESTED_BLOCK} factors")
        parts += [Part(nested_map, float32, (256,), None), Part(factors, float32, factors.shape, None)]
    kind = state.name.rpartition(_STATE)[2]
    return StoredTensor(name, shape, BitsAndBytes4Bit(kind, shape, block, nested), tuple(parts))
