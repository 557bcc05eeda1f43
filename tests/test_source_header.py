"""Safetensors headers: every way to be wrong, and agreement with the format's own library."""

import json
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from slicecast.convert.errors import (
    DuplicateTensorError,
    HeaderError,
    OffsetError,
    SlicecastError,
    TruncatedFileError,
    UnsupportedFormatError,
)
from slicecast.convert.source.safetensors_header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    header_nbytes,
    load_json,
    parse_header,
)

FILE = "model-00001-of-000002.safetensors"


def entry(dtype: Any = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(header: Any, data_bytes: int = 4) -> tuple[TensorInfo, ...]:
    """Parses a header (an object, text or bytes) of a file with `data_bytes` of data."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return parse_header(raw, file=FILE, file_size=8 + len(raw) + data_bytes)


def parse_file(data: bytes) -> tuple[TensorInfo, ...]:
    nbytes = header_nbytes(data[:8], file=FILE, file_size=len(data))
    return parse_header(data[8 : 8 + nbytes], file=FILE, file_size=len(data))


def assert_says(error: pytest.ExceptionInfo[SlicecastError], *words: str) -> None:
    """Every message names the file, what was found and expected, and what to do."""
    message = str(error.value)
    for word in (FILE, "found", "expected", "ownload the file again", *words):
        assert word in message
    assert len(message) < 2000


# ---- Valid headers


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {"__metadata__": {"format": "pt"}, "late": entry("I32", [1, 2], 4, 12), "early": entry()}
    start = 8 + len(json.dumps(header))
    assert parse(header, 12) == (
        TensorInfo("early", FILE, "U8", (4,), start, 4),
        TensorInfo("late", FILE, "I32", (1, 2), start + 4, 8),
    )


@pytest.mark.parametrize("padding", ["", " ", "       ", "\n"])
def test_padding_after_the_object(padding: str) -> None:
    (tensor,) = parse(json.dumps({"t": entry()}) + padding)
    assert tensor.offset == 8 + len(json.dumps({"t": entry()}) + padding)


def test_no_tensors() -> None:
    assert parse("{}", 0) == ()
    assert parse({"__metadata__": {}}, 0) == ()


def test_scalars_and_tensors_without_bytes() -> None:
    header = {
        "b": entry("F32", [], 0, 4),
        "a": entry("F32", [0, 7], 4, 4),
        "z": entry("F32", [0, 2**63 - 1], 0, 0),
        "c": entry("U8", [1], 4, 5),
    }
    tensors = parse(header, 5)
    assert [(t.name, t.shape, t.nbytes) for t in tensors] == [
        ("z", (0, 2**63 - 1), 0),
        ("b", (), 4),
        ("a", (0, 7), 0),
        ("c", (1,), 1),
    ]


def test_names_are_any_unicode_text() -> None:
    assert {t.name for t in parse({"größe.\U0001f600": entry(), "": entry(begin=4, end=8)}, 8)} == {
        "größe.\U0001f600",
        "",
    }


def library_view(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def our_view(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.nbytes]) for t in parse_file(data)}


INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
NUMPY_DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64", "complex64"]


@pytest.mark.parametrize("dtype", [*map(np.dtype, NUMPY_DTYPES), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_files_of_the_library(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"t{shape}": np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), np.uint8).view(dtype).reshape(shape)
        for shape in ((), (1,), (3, 5), (0, 4), (2, 1, 7))
    }
    data = save(arrays | {"other": np.arange(3, dtype=np.uint8)}, metadata={"format": "np"})
    ours = our_view(data)
    assert ours == library_view(data)
    assert all(ours[name][1:] == (array.shape, array.tobytes()) for name, array in arrays.items())


def test_one_file_of_the_library_with_every_dtype() -> None:
    data = save({name: np.ones((2, 3), name) for name in NUMPY_DTYPES})
    assert our_view(data) == library_view(data)
    assert len({dtype for dtype, _, _ in our_view(data).values()}) == len(NUMPY_DTYPES)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_librarys_width(dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype]  # Eight elements take as many bytes as one has bits.
    header = json.dumps({"t": entry(dtype, [2, 4], 0, nbytes)}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(range(nbytes))
    assert our_view(data) == library_view(data) == {"t": (dtype, (2, 4), bytes(range(nbytes)))}


def test_every_dtype_of_the_library_is_known() -> None:
    header = json.dumps({"t": entry("?")}).encode()
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as error:
        library_view(len(header).to_bytes(8, "little") + header)
    listed = str(error.value).partition("expected one of")[2]
    assert {name for name in listed.split("`") if name and name[0].isupper()} == set(DTYPE_BITS)


# ---- The length in front


def test_length() -> None:
    assert header_nbytes((300).to_bytes(8, "little"), file=FILE, file_size=308) == 300


@pytest.mark.parametrize("size", range(8))
def test_file_shorter_than_the_length_field(size: int) -> None:
    with pytest.raises(TruncatedFileError) as error:
        header_nbytes(bytes(size), file=FILE, file_size=size)
    assert_says(error, f"found {size} bytes")


def test_file_shorter_than_the_header() -> None:
    with pytest.raises(TruncatedFileError) as error:
        header_nbytes((300).to_bytes(8, "little"), file=FILE, file_size=307)
    assert_says(error, "found 307 bytes", "at least 308")


@pytest.mark.parametrize("nbytes", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_longer_than_the_format_allows(nbytes: int) -> None:
    with pytest.raises(HeaderError) as error:
        header_nbytes(nbytes.to_bytes(8, "little"), file=FILE, file_size=2**62)
    assert_says(error, str(nbytes), str(MAX_HEADER_BYTES))
    assert header_nbytes(MAX_HEADER_BYTES.to_bytes(8, "little"), file=FILE, file_size=2**62) == MAX_HEADER_BYTES


def test_git_lfs_pointer() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(HeaderError, match=r"model-00001.*Git LFS pointer.*git lfs pull"):
        parse_file(pointer)


# ---- JSON


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" {}",
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"[]",
        b"null",
        b'"t"',
        b"{",
        b"{}}",
        b"{} x",
        b'{"a": }',
        b'{"\xff": 1}',
        b'{"a\x00": 1}',
        b'{"a": ' * 100_000,
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda header: header[:12],
)
def test_not_a_json_object(header: bytes) -> None:
    with pytest.raises(HeaderError) as error:
        parse(header, 0)
    assert_says(error)


def test_a_tensor_named_twice() -> None:
    one = json.dumps(entry())
    with pytest.raises(DuplicateTensorError) as error:
        parse(f'{{"t.weight": {one}, "u": {one}, "t.weight": {one}}}')
    assert_says(error, "'t.weight'")


def test_a_field_given_twice() -> None:
    with pytest.raises(HeaderError) as error:
        parse('{"t": {"dtype": "U8", "shape": [4], "shape": [2, 2], "data_offsets": [0, 4]}}')
    assert_says(error, "'shape'")


def test_load_json_keeps_what_is_valid() -> None:
    assert load_json(b'{"a": [1, {"b": null}], "c": {"a": 1.5}}') == {"a": [1, {"b": None}], "c": {"a": 1.5}}


@pytest.mark.parametrize("metadata", [None, 1, "x", [], {"a": 1}, {"a": {}}, {"a": "\ud800"}, {"\ud800": "a"}])
def test_metadata_that_is_no_string_map(metadata: Any) -> None:
    with pytest.raises(HeaderError) as error:
        parse({"__metadata__": metadata, "t": entry()})
    assert_says(error, "__metadata__")


# ---- Entries


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_missing_field(field: str) -> None:
    broken = entry()
    del broken[field]
    with pytest.raises(HeaderError) as error:
        parse({"t": broken})
    assert_says(error, "'t'", field)


@pytest.mark.parametrize("value", [entry() | {"strides": [1]}, {}, [], None, 3, "U8"])
def test_entry_with_other_fields_or_none(value: Any) -> None:
    with pytest.raises(HeaderError) as error:
        parse({"t": value})
    assert_says(error, "'t'")


@pytest.mark.parametrize("dtype", [None, 8, ["U8"], {}])
def test_dtype_that_is_no_string(dtype: Any) -> None:
    with pytest.raises(HeaderError) as error:
        parse({"t": entry(dtype)})
    assert_says(error, "'t'", "dtype")


@pytest.mark.parametrize("dtype", ["", "u8", "BF16 ", "I4", "F8", "float32", "X" * 10**6])
def test_unknown_dtype(dtype: str) -> None:
    with pytest.raises(UnsupportedFormatError) as error:
        parse({"t": entry(dtype)})
    assert_says(error, "'t'", "BF16, ")


@pytest.mark.parametrize(
    "shape",
    [None, 4, "4", {}, [4.0], [True, 4], ["4"], [None], [[4]], [-4], [-2, -2], [2**63, 0], [1] * 64 + [4], [4, 1e300]],
    ids=lambda shape: str(shape)[:20],
)
def test_bad_shape(shape: Any) -> None:
    with pytest.raises(HeaderError) as error:
        parse({"t": entry(shape=shape)})
    assert_says(error, "'t'", "shape")


def test_the_largest_rank() -> None:
    assert parse({"t": entry(shape=[1] * 63 + [4])})[0].shape == (1,) * 63 + (4,)


@pytest.mark.parametrize(
    "offsets",
    [None, 4, {}, [], [0], [0, 4, 8], [0, 4.0], [False, 4], ["0", "4"], [4, 0], [-4, 0], [0, 2**63], [None, None]],
    ids=str,
)
def test_bad_offsets(offsets: Any) -> None:
    with pytest.raises(HeaderError) as error:
        parse({"t": entry() | {"data_offsets": offsets}})
    assert_says(error, "'t'", "data_offsets")


def test_name_that_is_half_a_character() -> None:
    with pytest.raises(HeaderError) as error:
        parse('{"t\\ud800": ' + json.dumps(entry()) + "}")
    assert_says(error)
    str(error.value).encode()


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("U8", [5], 4),
        ("U8", [3], 4),
        ("BF16", [4], 4),
        ("I32", [2, 0], 4),
        ("F32", [], 8),
        ("F4", [7], 4),
        ("F4", [7], 3),
        ("F6_E2M3", [5], 4),
        ("U8", [2**63 - 1] * 64, 4),
    ],
)
def test_length_that_disagrees_with_shape_and_dtype(dtype: str, shape: list[int], nbytes: int) -> None:
    with pytest.raises(OffsetError) as error:
        parse({"t": entry(dtype, shape, 0, nbytes)}, nbytes)
    assert_says(error, "'t'", dtype, f"{nbytes} bytes")


# ---- Ranges


def test_hole() -> None:
    with pytest.raises(OffsetError) as error:
        parse({"a": entry(), "b": entry(begin=5, end=9)}, 9)
    assert_says(error, "'b'", "'a'", "a hole", "byte 5", "byte 4")


def test_hole_at_the_start() -> None:
    with pytest.raises(OffsetError) as error:
        parse({"a": entry(begin=1, end=5)}, 5)
    assert_says(error, "'a'", "a hole", "the header ends")


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_overlap(begin: int) -> None:
    with pytest.raises(OffsetError) as error:
        parse({"a": entry(), "b": entry(begin=begin, end=begin + 4)}, begin + 4)
    assert_says(error, "'b'", "'a'", "an overlap")


@pytest.mark.parametrize("position", [1, 2, 3, 5])
def test_tensor_without_bytes_inside_another_or_behind_the_end(position: int) -> None:
    with pytest.raises(OffsetError) as error:
        parse({"a": entry(), "e": entry(shape=[0], begin=position, end=position)})
    assert_says(error, "'e'", "an overlap" if position < 4 else "a hole")


@pytest.mark.parametrize(
    ("data_bytes", "word"), [(0, "4 bytes too short"), (3, "1 bytes too short"), (5, "1 bytes too long")]
)
def test_file_of_another_length(data_bytes: int, word: str) -> None:
    header = json.dumps({"t": entry()})
    with pytest.raises(TruncatedFileError) as error:
        parse(header, data_bytes)
    assert_says(error, "'t'", f"found {8 + len(header) + data_bytes} bytes", f"expected {8 + len(header) + 4}", word)


def test_data_without_tensors() -> None:
    with pytest.raises(TruncatedFileError) as error:
        parse("{}", 1)
    assert_says(error, "too long")


# ---- Bounded time


def test_many_tensors_take_linear_time() -> None:
    count = 50_000
    header = json.dumps({f"model.layers.{i}.weight": entry(begin=4 * i, end=4 * i + 4) for i in range(count)})
    empty = json.dumps({f"model.layers.{i}.weight": entry(shape=[0], begin=0, end=0) for i in range(count)})
    overlapping = json.dumps({f"model.layers.{i}.weight": entry() for i in range(count)})
    wide = json.dumps({"t": entry(shape=[1] * 1_000_000)})
    repeated = "{" + ", ".join(f'"t{i}": 0' for i in [*range(count), 0]) + "}"
    start = time.perf_counter()
    assert len(parse(header, 4 * count)) == len(parse(empty, 0)) == count
    for text in (overlapping, wide, repeated):
        with pytest.raises(SlicecastError):
            parse(text)
    # A second or two; comparing all pairs would take minutes.
    assert time.perf_counter() - start < 15


# ---- Fuzz

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 20),
        st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30)]),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from([*DTYPE_BITS, "I4", "dtype", "shape", "data_offsets"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid header as an object, and the length of its data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    position = 0
    # Letters, marks, digits, punctuation, symbols: what can be printed.
    names = draw(
        st.lists(st.text(st.characters(categories=["L", "M", "N", "P", "S"]), max_size=4), unique=True, max_size=4)
    )
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        bits = int(np.prod(shape)) * DTYPE_BITS[dtype]
        if bits % 8 == 0:
            header[name] = entry(dtype, shape, position, position + bits // 8)
            position += bits // 8
    return header, position


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A file whose header object, text or length may be wrong in a few places."""
    header, data_bytes = draw(valid_headers())
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header))) if header else "x"
        kind = draw(st.sampled_from(["field", "drop", "entry", "new", "shift", "swap"]))
        value = header.get(name)
        if kind == "entry":
            header[name] = draw(json_values)
        elif kind == "new":
            header[draw(st.text(max_size=3))] = draw(json_values | st.just(entry()))
        elif kind == "drop":
            header.pop(name, None)
        elif isinstance(value, dict) and "data_offsets" in value:
            if kind == "field":
                value[draw(st.sampled_from(["dtype", "shape", "data_offsets", "strides"]))] = draw(json_values)
            elif kind == "shift" and isinstance(value["data_offsets"], list):
                value["data_offsets"] = [
                    o + draw(st.integers(-2, 2)) for o in value["data_offsets"] if isinstance(o, int)
                ]
            elif kind == "swap" and isinstance(value["shape"], list):
                value["shape"] = value["shape"][::-1]
    raw = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=3) | st.sampled_from([b",", b"}", b'"', b"0"]))
    length = max(0, len(raw) + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 10**9])))
    data = bytes(i % 251 for i in range(max(0, data_bytes + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 7])))))
    return length.to_bytes(8, "little") + bytes(raw) + data


outcomes: dict[str, int] = {}


# With a deadline on each example, a slow one fails the test.
@settings(max_examples=2000, deadline=2000, derandomize=True, database=None)
@given(mutated_files())
def check_mutated_file(data: bytes) -> None:
    """A file is refused with one of our errors, or read exactly as the format's library reads it."""
    refusal = None
    try:
        ours = our_view(data)
    except SlicecastError as error:
        refusal = error
    kind = "valid" if refusal is None else type(refusal).__name__
    outcomes[kind] = outcomes.get(kind, 0) + 1
    if refusal is None:
        assert ours == library_view(data)
    else:
        assert FILE in str(refusal)
        str(refusal).encode()


def test_mutated_headers() -> None:
    outcomes.clear()
    start = time.perf_counter()
    check_mutated_file()
    assert time.perf_counter() - start < 60  # About 10 s on one core.
    # The mutations reach every branch that matters, or the test would prove nothing.
    kinds = {"valid", "HeaderError", "OffsetError", "TruncatedFileError", "UnsupportedFormatError"}
    assert kinds <= outcomes.keys(), outcomes
    assert outcomes["valid"] > 200, outcomes


@settings(max_examples=300, deadline=2000, derandomize=True, database=None)
@given(valid_headers())
def test_valid_headers_are_accepted(header_and_length: tuple[dict[str, Any], int]) -> None:
    header, data_bytes = header_and_length
    raw = json.dumps(header).encode()
    data = len(raw).to_bytes(8, "little") + raw + bytes(i % 251 for i in range(data_bytes))
    assert our_view(data) == library_view(data)
