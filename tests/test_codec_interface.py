"""What every codec promises: the bytes that it reads and prepares, and how its arrays follow the rows."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import samples
import stored
from samples import COLUMNS, OUT, SAMPLES, Sample

from slicecast.convert.codecs import quantization_config
from slicecast.convert.codecs.base import Part
from slicecast.convert.errors import UnsupportedFormatError
from slicecast.convert.source.reader import Span
from slicecast.convert.source.safetensors_header import TensorInfo

# ---- Parts


def part(shape: tuple[int, ...], axis: int | None, per_row: Fraction = Fraction(1)) -> Part:
    tensor = TensorInfo("t", "f", "I32", shape, 1000, 4 * math.prod(shape))
    return Part(tensor, np.dtype(np.int32), shape, axis, per_row)


@pytest.mark.parametrize(
    ("shape", "axis", "per_row", "rows"),
    [
        ((12, 5), 0, Fraction(1), 12),
        ((12,), 0, Fraction(1), 12),
        ((3, 4, 5), 0, Fraction(1), 3),
        ((6, 5), 1, Fraction(1), 5),
        ((2, 3, 7), 2, Fraction(1), 7),
        ((2, 7, 3), 1, Fraction(1), 7),
        ((4, 5), 0, Fraction(1, 3), 10),
        ((6, 3), 1, Fraction(1, 8), 20),
        ((9, 2), 0, Fraction(3, 32), 90),
        ((15,), 0, Fraction(5, 2), 6),
        ((7, 4), None, Fraction(1), 10),
        ((0, 4), 0, Fraction(1), 0),
    ],
    ids=str,
)
def test_parts_read_what_covers_the_rows(
    shape: tuple[int, ...], axis: int | None, per_row: Fraction, rows: int
) -> None:
    """Every range of rows, against slices of the whole array: no byte more, and each run of bytes once."""
    whole = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    file = bytes(1000) + whole.tobytes()
    tested = part(shape, axis, per_row)
    for start, stop in itertools.combinations(range(rows + 1), 2):
        spans = tested.spans(start, stop)
        data = [np.frombuffer(file, np.uint8, span.nbytes, span.offset) for span in spans]
        found = tested.view(data, start, stop)
        index = [slice(None)] * len(shape)
        if axis is not None:
            index[axis] = slice(math.floor(start * per_row), math.ceil(stop * per_row))
        wanted = whole[tuple(index)]
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert np.array_equal(found, wanted)
        assert {span.file for span in spans} == {"f"}
        assert sum(span.nbytes for span in spans) == wanted.nbytes
        assert len(spans) == (1 if wanted.size == whole.size else math.prod(shape[:axis]))


def test_spans_of_whole_parts_are_one() -> None:
    assert part((6, 5), 1).spans(0, 5) == [Span("f", 1000, 120)]
    assert part((6, 5), None).spans(2, 3) == [Span("f", 1000, 120)]
    assert part((6, 5), 1).spans(1, 2) == [Span("f", 1004 + 20 * i, 4) for i in range(6)]


# ---- What every codec promises


@pytest.fixture(scope="module", params=SAMPLES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    """A checkpoint of each format."""
    sample = SAMPLES[request.param]
    return sample.write(tmp_path_factory.mktemp("sample")), sample


def test_the_bytes_that_are_read_and_prepared(written: tuple[Path, Sample]) -> None:
    """What the planner counts on, for every range of rows."""
    directory, sample = written
    tensor = stored.find(directory, sample.name, sample.shape)
    size = (directory / "model.safetensors").stat().st_size
    for start, stop in itertools.combinations(range(sample.shape[0] + 1), 2):
        arrays = stored.prepare(directory, tensor, start, stop)
        assert sum(array.nbytes for array in arrays) == tensor.prepared_bytes(stop - start)
        spans = [span for one in tensor.parts for span in one.spans(start, stop)]
        assert tensor.read_bytes(start, stop) == sum(span.nbytes for span in spans)
        assert all(span.offset + span.nbytes <= size for span in spans)


def test_ordered_inputs_take_no_more_than_planned(tmp_path: Path) -> None:
    """Whether GPTQ's inputs are in order is not in any header; where they are, their groups are left out."""
    sample = SAMPLES["gptq desc_act"]
    ordered = sample.replaced(**{"m.g_idx": ("I32", np.arange(COLUMNS, dtype=np.int32) // 32)})
    tensor = stored.find(ordered.write(tmp_path), sample.name, sample.shape)
    arrays = stored.prepare(tmp_path, tensor, 0, OUT)
    assert sum(array.nbytes for array in arrays) == tensor.prepared_bytes(OUT) - 4 * COLUMNS


def test_codecs_say_how_their_arrays_follow_the_rows(written: tuple[Path, Sample]) -> None:
    """The shares of the rows that chips get, in whole units, are what the same rows alone are."""
    directory, sample = written
    tensor = stored.find(directory, sample.name, sample.shape)
    codec = tensor.codec
    whole = stored.prepare(directory, tensor, 0, sample.shape[0])
    assert len(whole) <= len(codec.row_axes)
    unit = codec.row_unit
    for start, stop in itertools.combinations(range(0, sample.shape[0] + 1, unit), 2):
        for array, axis, alone in zip(
            whole, codec.row_axes, stored.prepare(directory, tensor, start, stop), strict=False
        ):
            if axis is None:
                assert np.array_equal(alone, array, equal_nan=True)
                continue
            indices = array.shape[axis] * unit // sample.shape[0]
            index = [slice(None)] * array.ndim
            index[axis] = slice(start // unit * indices, stop // unit * indices)
            assert np.array_equal(alone.view(np.uint8), np.ascontiguousarray(array[tuple(index)]).view(np.uint8))


def test_codecs_are_static_arguments(written: tuple[Path, Sample]) -> None:
    """They are equal and hash alike where they are the same, for they are part of what is compiled once."""
    directory, sample = written
    one, other = (stored.find(directory, sample.name, sample.shape).codec for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one.changes_values == (one.description not in ("bfloat16", "float32"))


def test_tensors_of_a_kind_share_a_codec(tmp_path: Path) -> None:
    """So that tensors of all layers go to the chips together, in one program."""
    for name, sample in SAMPLES.items():
        tensors = {
            f"{layer}{stored_name}": content
            for layer in ("a.", "b.")
            for stored_name, content in sample.tensors.items()
        }
        directory = stored.write(tmp_path / name.replace(" ", "-"), tensors, sample.config)
        one, other = (stored.find(directory, f"{layer}{sample.name}", sample.shape) for layer in ("a.", "b."))
        assert one.codec == other.codec, name


def test_global_scales_that_no_model_has(tmp_path: Path) -> None:
    """Zero, infinity and NaN give what float32 gives; numbers so large or small that it matters how are refused."""
    for name in ("nvfp4", "nvfp4 modelopt"):
        sample = SAMPLES[name]
        factor_name = list(sample.tensors)[2]
        for factor in (2.0**-100, 2.0**100, -1.0, 0.0, -0.0, np.inf, np.nan):
            changed = sample.replaced(**{factor_name: ("F32", np.array([factor], np.float32))})
            samples.assert_decodes(changed.write(tmp_path), sample.name, sample.shape)
        for factor in (2.0**-101, -(2.0**101), 1e-44):
            changed = sample.replaced(**{factor_name: ("F32", np.array([factor], np.float32))})
            changed.write(tmp_path)
            with pytest.raises(
                UnsupportedFormatError, match=r"model\.safetensors: tensor 'm\.weight.*' has the global"
            ):
                stored.decode(tmp_path, sample.name, sample.shape)


def test_announcements_of_the_samples() -> None:
    """They are what publishers write, so nothing of them is refused."""
    for sample in SAMPLES.values():
        found = quantization_config.read(sample.config)
        assert found is None or found.refusal is None
