"""What each stored format means, written down in NumPy for `verify`: plain, slow, and on a path of its own.

No code of the codecs, of the kernels or of the reader is used, only what a codec's fields say. Bits are taken apart one
by one, partners are read whole and indexed by absolute rows and columns, and every value is one float32 expression.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from slicecast.convert.codecs.awq import Awq
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.bitsandbytes import BitsAndBytes4Bit
from slicecast.convert.codecs.constant import Constant
from slicecast.convert.codecs.gptq import Gptq
from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.codecs.joined import Joined, member_tensors
from slicecast.convert.codecs.mlx import MlxAffine
from slicecast.convert.codecs.plain import Integers, Plain
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.convert.source.storage import ByteRange, Storage

Array: TypeAlias = np.ndarray[Any, Any]

_DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F4": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": np.uint8,
    "I8": np.int8,
    "I32": "<i4",
    "I64": "<i8",
    "U8": np.uint8,
    "U32": "<u4",
}

# The values of the sixteen codes of E2M1, in which bit 3 is the sign.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# AutoAWQ's writer puts these columns of eight into a word, beginning with its lowest bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def rows(storage: Storage, tensor: StoredTensor, start: int, stop: int) -> Array:
    """Some rows of a stored tensor: in the stored dtype if it is plain, else as float32, not yet rounded.

    Args:
        storage: Where the checkpoint's files are.
        tensor: The tensor.
        start: The first index of its first axis.
        stop: One past the last.
    """
    codec = tensor.codec
    files = [part.tensor for part in tensor.parts]
    with np.errstate(all="ignore"):  # NaN, infinity and overflow are values like others here.
        match codec:
            case Constant():
                return np.full((stop - start, *codec.columns), codec.value, np.float32)
            case Integers():
                return _read_rows(storage, files[0], start, stop).astype(np.float32)
            case Plain():
                values = _plain(storage, files[0], start, stop)
                within = tensor.parts[0].within
                return values if within is None else values[:, slice(*within)]
            case Joined():
                return _joined(storage, codec, tensor)[start:stop]
            case Grouped():
                return _grouped(storage, codec, files, start, stop)
            case Gptq():
                return _gptq(storage, codec, files, start, stop)
            case Awq():
                return _awq(storage, codec, files, start, stop)
            case BitsAndBytes4Bit():
                return _bitsandbytes(storage, codec, files, start, stop)
            case MlxAffine():
                return _mlx(storage, codec, files, start, stop)
    raise TypeError(f"verify does not know the codec {codec}")


def int4_codes_and_scales(storage: Storage, tensor: StoredTensor, start: int, stop: int) -> tuple[Array, Array]:
    """The codes of some rows of a symmetric INT4 tensor, int8 `[rows, columns]`, and their scales `[rows, groups]`."""
    codec = tensor.codec
    assert isinstance(codec, Grouped), "the caller chose INT4 tensors"
    weight, scale = (part.tensor for part in tensor.parts)
    codes: Array = _code_values(codec, _read_rows(storage, weight, start, stop)).astype(np.int8)
    return codes, _read_rows(storage, scale, start, stop)


def _plain(storage: Storage, file: TensorInfo, start: int, stop: int) -> Array:
    there = min(stop, file.shape[0])
    zeros = np.zeros((stop - max(start, there), *_shape(file)[1:]), _DTYPES[file.dtype])
    return zeros if start >= there else np.concatenate([_read_rows(storage, file, start, there), zeros])


def _joined(storage: Storage, codec: Joined, tensor: StoredTensor) -> Array:
    values = [rows(storage, member, 0, member.shape[0]) for member in member_tensors(tensor)]
    turns: list[Array] = []
    for turn in range(codec.groups):
        for member, start, stop in codec.takes:
            share = (stop - start) // codec.groups
            turns.append(values[member][start + turn * share : start + (turn + 1) * share])
    return np.concatenate(turns)


def _grouped(storage: Storage, codec: Grouped, files: Sequence[TensorInfo], start: int, stop: int) -> Array:
    weight, scale, *others = files
    values = _code_values(codec, _read_rows(storage, weight, start, stop))
    factors = _scale_values(codec, scale, _read(storage, scale))
    if codec.global_scale is not None:
        last = _read(storage, others.pop()).reshape(())
        factors = factors * last if codec.global_scale == "multiply" else factors / last
    stacked = values.ndim == 3
    # As a stack of matrices [matrices, scale rows, groups], of which the wanted ones are taken.
    scale_rows = -(-codec.out // codec.rows_per_scale)
    factors = factors.reshape(-1, scale_rows, codec.groups)[start if stacked else 0 : stop if stacked else 1]
    out = np.arange(codec.out) if stacked else np.arange(start, stop)
    index = np.ix_(np.arange(len(factors)), out // codec.rows_per_scale, np.arange(codec.columns) // codec.group_size)
    values = values.reshape(len(factors), len(out), codec.columns)
    if codec.zero == "bytes":
        zero = _read(storage, others[0]).reshape(-1, scale_rows, codec.groups)
        values = values - zero[start if stacked else 0 : stop if stacked else 1][index].astype(np.float32)
    elif codec.zero is not None:
        words = _read(storage, others[0])
        zero = _codes(words.T, codec.out, codec.zero.bits, dense=codec.zero.dense).T - np.float32(codec.zero.offset)
        values = values - zero[np.newaxis][index]
    result: Array = values * factors[index]
    if not stacked:
        return np.asarray(result[0])
    return result.swapaxes(1, 2) if codec.transposed else result


def _code_values(codec: Grouped, stored: Array) -> Array:
    """What the codes stand for, before zero points, `float32[..., columns]`."""
    data = stored.view(np.uint8)
    if codec.packing is not None:
        words = data.reshape(len(data), -1).view("<i4")
        codes = _codes(words, codec.columns, codec.packing.bits, dense=codec.packing.dense)
        return codes - np.float32(codec.packing.offset)
    if codec.code in ("int4_offset", "e2m1"):
        # gpt-oss cuts rows into blocks of bytes.
        data = data.reshape(*data.shape[: 2 if data.ndim > 2 else 1], -1)
        nibbles = np.stack([data % 16, data // 16], axis=-1).reshape(*data.shape[:-1], -1)[..., : codec.columns]
        return _E2M1[nibbles] if codec.code == "e2m1" else nibbles.astype(np.float32) - np.float32(8)
    if codec.code == "int8_offset":
        return data[..., : codec.columns].astype(np.float32) - np.float32(128)
    dtypes = {"int8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    values: Array = data.view(dtypes[codec.code]).astype(np.float32)
    return values


def _scale_values(codec: Grouped, scale: TensorInfo, stored: Array) -> Array:
    if codec.scale_format != "e8m0":
        return stored.astype(np.float32)
    exponents = stored.view(np.uint8)
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return np.where(exponents == 255, np.float32(np.nan), powers).astype(np.float32)


def _gptq(storage: Storage, codec: Gptq, files: Sequence[TensorInfo], start: int, stop: int) -> Array:
    words, packed_zero, scale, *order = (_read(storage, file) for file in files)
    codes = _codes(words[:, start:stop].T, codec.columns, codec.bits)
    zero = _codes(packed_zero, scale.shape[1], codec.bits)[:, start:stop]
    if codec.stored_less_one:
        zero = (zero + 1) % (1 << codec.bits)
    group = order[0] if order else np.arange(codec.columns) // codec.group_size
    return (codes - zero[group].T) * scale.astype(np.float32)[group, start:stop].T


def _awq(storage: Storage, codec: Awq, files: Sequence[TensorInfo], start: int, stop: int) -> Array:
    words, packed_zero, scale = (_read(storage, file) for file in files)
    first = start // 8
    some_words = words[:, first : -(-stop // 8)]

    def in_order(packed: Array) -> Array:
        codes = _codes(packed, packed.shape[1] * 8, 4).reshape(len(packed), -1, 8)
        ordered = np.empty_like(codes)
        ordered[..., _AWQ_ORDER] = codes
        return ordered.reshape(len(packed), -1)

    group = np.arange(codec.columns) // codec.group_size
    codes = in_order(some_words)[:, start - 8 * first : stop - 8 * first]
    zero = in_order(packed_zero)[:, start:stop]
    return ((codes - zero[group]) * scale.astype(np.float32)[group, start:stop]).T


def _bitsandbytes(
    storage: Storage, codec: BitsAndBytes4Bit, files: Sequence[TensorInfo], start: int, stop: int
) -> Array:
    data, absmax, quant_map, state, *nested = (_read(storage, file) for file in files)
    flat = np.stack([data.ravel() // 16, data.ravel() % 16], axis=-1).ravel()
    if codec.nested:
        offset = np.float32(json.loads(state.tobytes())["nested_offset"])
        absmax = nested[0][absmax] * np.repeat(nested[1], 256)[: len(absmax)] + offset
    wanted = np.arange(start * codec.shape[1], stop * codec.shape[1])
    values: Array = quant_map[flat[wanted]] * absmax[wanted // codec.block_size]
    return values.reshape(-1, codec.shape[1])


def _mlx(storage: Storage, codec: MlxAffine, files: Sequence[TensorInfo], start: int, stop: int) -> Array:
    words, scale, bias = (_read_rows(storage, file, start, stop) for file in files)
    group = np.arange(codec.columns) // codec.group_size
    scaled = _codes(words, codec.columns, codec.bits) * scale.astype(np.float32)[:, group]
    return scaled + bias.astype(np.float32)[:, group]


def _codes(words: Array, count: int, bits: int, *, dense: bool = True) -> Array:
    """The first unsigned codes of each row of little-endian 32-bit words, as float32 `[rows, count]`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    if not dense:
        per_word = 32 // bits
        stream = stream.reshape(len(words), -1, 32)[:, :, : per_word * bits].reshape(len(words), -1)
    codes = np.zeros((len(words), count), np.float32)
    for bit in range(bits):
        codes += stream[:, bit : count * bits : bits] * np.float32(1 << bit)
    return codes


def _read(storage: Storage, tensor: TensorInfo) -> Array:
    """A whole tensor."""
    return _read_bytes(storage, tensor, 0, tensor.nbytes).reshape(_shape(tensor))


def _read_rows(storage: Storage, tensor: TensorInfo, start: int, stop: int) -> Array:
    """The indices `start` to `stop` of a tensor's first axis."""
    row = tensor.nbytes // max(tensor.shape[0], 1)
    return _read_bytes(storage, tensor, start * row, stop * row).reshape((stop - start, *_shape(tensor)[1:]))


def _read_bytes(storage: Storage, tensor: TensorInfo, start: int, stop: int) -> Array:
    data = np.empty(stop - start, np.uint8)
    if len(data):
        storage.read(ByteRange(tensor.file, tensor.offset + start, len(data)), [data.data])
    return data.view(_DTYPES[tensor.dtype])


def _shape(tensor: TensorInfo) -> tuple[int, ...]:
    """The shape of what `_read` gives: two elements of F4 are a byte."""
    return (*tensor.shape[:-1], tensor.shape[-1] // 2) if tensor.dtype == "F4" else tensor.shape
