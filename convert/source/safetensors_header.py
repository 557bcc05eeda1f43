"""Parses safetensors headers. Pure: bytes in, tensor positions out.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON, then the data. The JSON maps each tensor name
to its `dtype`, `shape` and `data_offsets` (begin and end, in bytes from the start of the data); `__metadata__` maps
strings to strings. The data has no holes, no overlaps, and ends where the file ends. Source of these rules: the
format's own library, https://github.com/huggingface/safetensors (README, "Format"; `safetensors/src/tensor.rs`).

We parse it ourselves because that library cannot read F8, E8M0 and F4 through NumPy and wants to map whole files.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from reprlib import Repr
from typing import Any

from slicecast.convert.errors import (
    DuplicateTensorError,
    HeaderError,
    OffsetError,
    SlicecastError,
    TruncatedFileError,
    UnsupportedFormatError,
)

PREFIX_BYTES = 8  # The length field in front of the JSON.
MAX_HEADER_BYTES = 100_000_000  # The format's own library refuses longer headers.
MAX_RANK = 64  # NumPy's limit; it also keeps the product of a hostile shape a small integer.
MAX_DIMENSION = 2**63 - 1  # Sizes are 64-bit signed in NumPy, JAX and TensorStore.

# Bits an element takes in the file, for every dtype that safetensors 0.8.0 knows.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

# Names reach messages, logs and terminals: neither control characters nor endless ones are accepted. The longest names
# of published tensors have some hundred characters; file systems take 255 bytes.
MAX_NAME_CHARACTERS = 255

# Configs, indexes and headers nest a few levels. Python's own parser takes a thousand and more, which its own encoder
# then does not.
MAX_JSON_DEPTH = 64

_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_DOWNLOAD_AGAIN = "Download the file again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes lie.

    Attributes:
      name: the tensor's name in the checkpoint.
      file: the file's name, relative to the checkpoint's directory.
      dtype: as the header spells it, a key of `DTYPE_BITS`.
      shape: as the header gives it (elements; F4 counts elements, not bytes).
      offset: position of the first byte in the file, in bytes.
      nbytes: length in bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class RepeatedKeyError(ValueError):
    """A JSON object holds the same key twice. `load_json` raises it; callers turn it into an error for users."""

    def __init__(self, key: str):
        self.key = key
        super().__init__(f"the key {clip(key)} occurs more than once in one JSON object")


_SHORT = Repr()
_SHORT.maxstring = MAX_NAME_CHARACTERS


def clip(value: object) -> str:
    """`repr`, cut to the length of a name: nothing in it garbles a terminal or floods it."""
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_NAME_CHARACTERS else f"{text[:MAX_NAME_CHARACTERS]}..."


def is_name(value: object) -> bool:
    """Tells whether `value` can be the name of a tensor or a file: text that can be shown, and is not endless."""
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS and value.isprintable()


def load_json(data: bytes) -> Any:
    """Parses UTF-8 JSON, and refuses an object that repeats a key.

    Raises:
      RepeatedKeyError: Python's parser would silently keep the last value.
      ValueError: not UTF-8, not JSON, nested too deeply, or a number of absurd length.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)
    return content


_TOO_DEEP = f"the JSON is nested more than {MAX_JSON_DEPTH} levels deep"


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def header_nbytes(prefix: bytes, *, file: str, file_size: int) -> int:
    """Returns the length in bytes of the JSON header, from the file's first 8 bytes.

    Args:
      prefix: the first 8 bytes, or fewer if the file is shorter.
      file: the file's name, for messages.
      file_size: the file's length in bytes.

    Raises:
      TruncatedFileError: the file ends before the header does.
      HeaderError: the length is over the format's limit, so this is no safetensors file.
    """
    if prefix.startswith(b"version "):
        raise HeaderError(
            f"{file}: this is a Git LFS pointer, not the tensors themselves ({file_size} bytes). "
            f"Run `git lfs pull` in the checkpoint's directory."
        )
    if len(prefix) < PREFIX_BYTES:
        raise TruncatedFileError(
            f"{file}: found {file_size} bytes, expected at least the {PREFIX_BYTES} bytes of the header's length. "
            f"{_DOWNLOAD_AGAIN}"
        )
    nbytes = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if nbytes > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{file}: found a header length of {nbytes} bytes, expected at most {MAX_HEADER_BYTES}. "
            f"This is not a safetensors file, or it is damaged. {_DOWNLOAD_AGAIN}"
        )
    if PREFIX_BYTES + nbytes > file_size:
        raise TruncatedFileError(
            f"{file}: found {file_size} bytes, expected at least {PREFIX_BYTES + nbytes} for the header alone. "
            f"{_DOWNLOAD_AGAIN}"
        )
    return nbytes


def parse_header(header: bytes, *, file: str, file_size: int) -> tuple[TensorInfo, ...]:
    """Parses and checks a header.

    Args:
      header: the JSON, without the 8 bytes in front.
      file: the file's name, for messages and for `TensorInfo.file`.
      file_size: the file's length in bytes.

    Returns:
      The tensors in the order of their bytes. Their ranges cover everything behind the header, once.

    Raises:
      HeaderError: not JSON, or a field is missing, unknown, or of the wrong type.
      DuplicateTensorError: a name occurs twice.
      UnsupportedFormatError: a dtype that the format does not know.
      OffsetError: ranges overlap, leave holes, or disagree with shape and dtype.
      TruncatedFileError: the file is shorter or longer than the header says.
    """
    entries = _load_entries(header, file)
    data_start = PREFIX_BYTES + len(header)
    tensors = [_parse_entry(name, entry, file, data_start) for name, entry in entries.items()]
    # A tensor without bytes may share its position with the next one: it comes first.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name))
    position, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != position:
            what = "a hole" if tensor.offset > position else "an overlap"
            raise _tensor_error(
                OffsetError,
                *(file, tensor.name, f"data_offsets that start at byte {tensor.offset - data_start}, {what}"),
                f"byte {position - data_start}, where {previous} ends",
            )
        position, previous = tensor.offset + tensor.nbytes, f"tensor {tensor.name!r}"
    if position != file_size:
        raise TruncatedFileError(
            f"{file}: found {file_size} bytes, expected {position} ({previous} ends there); the file is "
            f"{abs(position - file_size)} bytes too {'short' if file_size < position else 'long'}. {_DOWNLOAD_AGAIN}"
        )
    return tuple(tensors)


def _load_entries(header: bytes, file: str) -> dict[str, Any]:
    """Returns the header's JSON object without `__metadata__`."""
    try:
        if not header.startswith(b"{"):
            raise ValueError(f"it starts with {header[:8]!r}")
        entries = load_json(header)
    except RepeatedKeyError as error:
        if error.key in _FIELDS:
            raise _header_error(file, f"a field {error.key!r} given twice for one tensor", "each field once") from None
        raise DuplicateTensorError(
            f"{file}: found the tensor {clip(error.key)} more than once in the header, expected each name once. "
            f"{_DOWNLOAD_AGAIN}"
        ) from None
    except ValueError as error:
        raise _header_error(file, f"a header that cannot be parsed ({error})", "a JSON object in UTF-8") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(text) for pair in metadata.items() for text in pair):
        raise _header_error(file, "a `__metadata__` that is something else", "a map from strings to strings")
    return entries  # type: ignore[no-any-return]  # JSON that starts with a brace is an object.


def _parse_entry(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    """Checks one tensor's entry on its own."""
    if not is_name(name):
        expected = f"at most {MAX_NAME_CHARACTERS} characters that can be printed"
        raise _tensor_error(HeaderError, file, name, "a name that cannot be shown, or is too long", expected)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _tensor_error(HeaderError, file, name, f"the fields {clip(found)}", f"exactly {sorted(_FIELDS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _tensor_error(HeaderError, file, name, f"a dtype of type {type(dtype).__name__}", "a string")
    if dtype not in DTYPE_BITS:
        raise UnsupportedFormatError(
            f"{file}: tensor {clip(name)}: found dtype {clip(dtype)}, expected one of {', '.join(DTYPE_BITS)}. "
            f"Download the file again, or save the tensor with another dtype."
        )
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        expected = f"at most {MAX_RANK} integers from 0 to {MAX_DIMENSION}"
        raise _tensor_error(HeaderError, file, name, f"shape {clip(shape)}", expected)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _tensor_error(HeaderError, file, name, f"data_offsets {clip(offsets)}", "[begin, end], begin <= end")
    bits, (begin, end) = prod(shape) * DTYPE_BITS[dtype], offsets
    if bits != 8 * (end - begin):
        expected = f"{bits // 8} bytes" if bits % 8 == 0 else f"a whole number of bytes, not {bits} bits"
        found = f"{end - begin} bytes for {dtype} {clip(shape)}"
        raise _tensor_error(OffsetError, file, name, found, expected)
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def _is_text(value: Any) -> bool:
    """Tells whether `value` is a string of Unicode text. JSON can also spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_sizes(value: Any) -> bool:
    """Tells whether `value` is a list of sizes. JSON's true and false are integers to Python, and are no sizes."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in value)


def _header_error(file: str, found: str, expected: str) -> HeaderError:
    return HeaderError(f"{file}: found {found}, expected {expected}. {_DOWNLOAD_AGAIN}")


def _tensor_error(kind: type[SlicecastError], file: str, name: str, found: str, expected: str) -> SlicecastError:
    return kind(f"{file}: tensor {clip(name)}: found {found}, expected {expected}. {_DOWNLOAD_AGAIN}")
