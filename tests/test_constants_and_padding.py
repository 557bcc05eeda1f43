"""What no checkpoint has: constants, rows of zeros, whole numbers as floats; and rows that are left out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import samples
import stored
import tiny_models
from test_every_format import SMALL_BOXES

from slicecast.configs import families
from slicecast.convert import orbax_checkpoint, plan, tiles
from slicecast.convert.codecs import constant, plain, quantization_config
from slicecast.convert.codecs.base import Part, StoredTensor
from slicecast.convert.errors import PlanErrors, ShapeError, UnsupportedFormatError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import Model, ModelOptions, Rule
from slicecast.convert.mapping.target import ROOT, Layout
from slicecast.convert.memory import GB, Machine
from slicecast.convert.source.checkpoint import open_checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.safetensors_header import TensorInfo
from slicecast.convert.verification import definition

Array = np.ndarray[Any, Any]


def decoded(tensor: StoredTensor, prepared: tuple[Array, ...], dtype: str) -> Array:
    """What the chips make of what the host prepared."""
    batch = [jnp.asarray(array)[jnp.newaxis] for array in prepared]
    return np.asarray(tensor.codec.decode(batch, dtype=dtype, transposed=False, implementation="xla")[0])


def model(*rules: Rule) -> Model:
    """A model of these rules."""
    return Model(family="made up", description="a model", rules=rules)


def only_source(directory: Path, rule: Rule) -> StoredTensor:
    """How a checkpoint stores the one tensor of a rule."""
    ((leaf,), _) = resolve.resolve(open_checkpoint(str(directory)), model(rule), Layout(False), None)
    (source,) = leaf.sources.values()
    return source


# ---- Constants


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 3), (5, 6)])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3)])
def test_constants(shape: tuple[int, ...], start: int, stop: int, dtype: str) -> None:
    tensor = constant.stored("decoder/scale", shape, 0.1)
    prepared = tensor.prepare([], start, stop)
    assert sum(array.nbytes for array in prepared) == tensor.prepared_bytes(stop - start)
    wanted = np.full((stop - start, *shape[1:]), np.float32(0.1), np.float32)
    found = decoded(tensor, prepared, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted.astype(dtype))
    of_definition = definition.rows(Directory("/nowhere"), tensor, start, stop)
    assert of_definition.dtype == np.float32
    np.testing.assert_array_equal(of_definition, wanted)


def test_constants_are_read_from_nowhere() -> None:
    tensor = constant.stored("decoder/scale", (6, 3), 1.0)
    assert (tensor.names, tensor.parts, tensor.read_bytes(0, 6)) == ((), (), 0)
    assert tensor.codec.description == "constant 1"


# ---- Rows that are added or left out


STORED = 13
COLUMNS = 6


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """A checkpoint with an embedding of 13 rows, and the rows."""
    values = np.random.default_rng(0).standard_normal((STORED, COLUMNS), np.float32).astype(ml_dtypes.bfloat16)
    return stored.write(tmp_path_factory.mktemp("table"), {"embed.weight": ("BF16", values)}, {}), values


def embedding(rows: int, stored_rows: int = STORED) -> Rule:
    """A rule for an embedding that has `rows` rows in the model."""
    return Rule("embed.weight", (rows, COLUMNS), "embedding", (), ("vocab", "embed"), stored_rows=stored_rows)


# Within what is stored, across its end, and wholly beyond it; beginning and ending at each edge.
RANGES = [
    (0, 20),
    (0, 13),
    (0, 1),
    (5, 9),
    (12, 13),
    (5, 13),
    (12, 14),
    (5, 20),
    (13, 20),
    (13, 14),
    (15, 18),
    (19, 20),
]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_rows_of_zeros(table: tuple[Path, Array], start: int, stop: int) -> None:
    directory, values = table
    tensor = only_source(directory, embedding(20))
    wanted = np.concatenate([values, np.zeros((7, COLUMNS), values.dtype)])[start:stop]
    prepared = stored.prepare(directory, tensor, start, stop)
    assert [array.nbytes for array in prepared] == [tensor.prepared_bytes(stop - start)]
    found = decoded(tensor, prepared, "bfloat16")
    assert found.tobytes() == wanted.tobytes()
    of_definition = definition.rows(Directory(str(directory)), tensor, start, stop)
    assert (of_definition.dtype, of_definition.tobytes()) == (wanted.dtype, wanted.tobytes())
    # Only what is there is read.
    assert tensor.read_bytes(start, stop) == max(min(stop, STORED) - start, 0) * COLUMNS * 2


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 1), (3, 7), (8, 9), (4, 9)])
def test_rows_that_are_left_out(table: tuple[Path, Array], start: int, stop: int) -> None:
    directory, values = table
    tensor = only_source(directory, embedding(9))
    assert tensor.shape == (9, COLUMNS)
    found = decoded(tensor, stored.prepare(directory, tensor, start, stop), "bfloat16")
    assert found.tobytes() == values[start:stop].tobytes()
    assert definition.rows(Directory(str(directory)), tensor, start, stop).tobytes() == values[start:stop].tobytes()
    assert tensor.read_bytes(start, stop) == (stop - start) * COLUMNS * 2


@pytest.mark.parametrize("rows", [9, 20])
def test_the_stored_rows_are_checked(table: tuple[Path, Array], rows: int) -> None:
    """A checkpoint with yet another number of rows is not stretched or cut to fit."""
    directory, _ = table
    with pytest.raises(PlanErrors) as caught:
        only_source(directory, embedding(rows, stored_rows=STORED + 1))
    (error,) = caught.value.errors
    assert isinstance(error, ShapeError)
    assert "tensor 'embed.weight' has shape [13, 6], but config.json gives [14, 6]" in str(error)


def test_quantized_embeddings_keep_their_rows(tmp_path: Path) -> None:
    sample = samples.MAKERS["fp8 blocks"](np.random.default_rng(0))
    directory = stored.write(tmp_path, sample.tensors, sample.config)
    rule = Rule(sample.name, (sample.shape[0] + 8, sample.shape[1]), "t", (), ("a", "b"), stored_rows=sample.shape[0])
    checkpoint = open_checkpoint(str(directory))
    assert resolve.resolve(
        checkpoint, model(replace(rule, shape=sample.shape, stored_rows=None)), Layout(False), announced(directory)
    )
    with pytest.raises(PlanErrors) as caught:
        resolve.resolve(checkpoint, model(rule), Layout(False), announced(directory))
    (error,) = caught.value.errors
    assert isinstance(error, UnsupportedFormatError)
    assert f"tensor '{sample.name}' is stored as float8_e4m3" in str(error)
    assert "rows are added or left out only where values are plain numbers" in str(error)


def announced(directory: Path) -> Any:
    """What a checkpoint says about its quantization."""
    checkpoint = open_checkpoint(str(directory))
    return quantization_config.read(checkpoint.config, checkpoint.side_configs)


@pytest.mark.parametrize(
    ("start", "stop", "indices"), [(0, 13, (0, 13)), (3, 20, (3, 13)), (13, 20, (13, 13)), (15, 18, (13, 13))]
)
def test_rows_beyond_the_end_have_no_indices(start: int, stop: int, indices: tuple[int, int]) -> None:
    part = Part(TensorInfo("w", "f", "F32", (STORED, 2), 0, STORED * 8), np.dtype(np.float32), (STORED, 2))
    assert part.indices(start, stop) == indices
    assert sum(span.nbytes for span in part.spans(start, stop)) == (indices[1] - indices[0]) * 8
    # Where rows share indices, and where none belongs to a row, nothing is clamped.
    assert replace(part, per_row=Fraction(1, 4)).indices(3, 9) == (0, 3)
    assert replace(part, axis=None).indices(15, 18) == (15, 18)


# ---- From the command line


# A budget for boxes of a few rows.
HOST_BYTES = 30_000


def boxes_of(source: Path, vocab_size: int, path: str) -> list[tuple[int, int]]:
    """The stored rows, as (start, stop), of the boxes in which a leaf is made."""
    checkpoint = open_checkpoint(str(source))
    recognized = families.recognize(checkpoint.config, ModelOptions(vocab_size=vocab_size))
    layout = Layout(scan_layers=True)
    resolved, ignored = resolve.resolve(checkpoint, recognized, layout, None)
    made = plan.make(checkpoint, recognized, layout, "", resolved, ignored, Machine(1, 4, HOST_BYTES, None))
    return sorted(work.leaf.rows(work.box) for work in made.boxes if work.leaf.leaf.path == f"{ROOT}/{path}")


# Leaves whose rows are the vocabulary's: as they are stored, transposed, and computed with.
VOCABULARIES: list[tuple[str, str, Callable[[Array], Array]]] = [
    ("qwen3", "token_embedder/embedding", lambda x: x),
    ("qwen3", "decoder/logits_dense/kernel", lambda x: x.T),
    ("gemma", "token_embedder/embedding", lambda x: (x.astype(np.float32) * np.float32(24**0.5)).astype(stored.BF16)),
]
NAMES = {"token_embedder/embedding": "model.embed_tokens.weight", "decoder/logits_dense/kernel": "lm_head.weight"}
TOKENS = 56


@pytest.mark.parametrize("vocab_size", [TOKENS - 13, TOKENS + 64])
@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_other_vocabularies(
    slicecast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, vocab_size: int
) -> None:
    """In boxes of a few rows, on four devices; where rows are added, some boxes have no others."""
    source, output = tiny_models.write(tmp_path / "source", name), tmp_path / "output"
    flags = [f"--hf_model_path={source}", f"--base_output_directory={output}", f"--vocab_size={vocab_size}"]
    flags += [f"--host_memory_gb={HOST_BYTES / GB:.5f}", "--simulated_cpu_devices_count=4"]
    done = slicecast.run("convert", *flags, prelude=SMALL_BOXES)
    assert f"MaxText's model has {vocab_size} tokens, the checkpoint {TOKENS}" in done.stderr
    done = slicecast.run("verify", output, f"--hf_model_path={source}", prelude=SMALL_BOXES)
    assert "all equal to the source, bit for bit" in done.stdout
    arrays = orbax_checkpoint.open_arrays(output)
    tensors = tiny_models.tensors(tiny_models.model(name), 1)
    monkeypatch.setattr(tiles, "COLUMN_BYTES", 1000)
    monkeypatch.setattr(tiles, "REQUEST_BYTES", 32)
    monkeypatch.setattr(tiles, "SMALL_BYTES", 32)
    for family, path, laid_out in VOCABULARIES:
        if family != name:
            continue
        rows = tensors[NAMES[path]][1][:vocab_size]
        wanted = np.concatenate([rows, np.zeros((vocab_size - len(rows), rows.shape[1]), rows.dtype)])
        found = arrays[f"{ROOT}/{path}"].read().result()
        assert found.tobytes() == np.ascontiguousarray(laid_out(wanted)).tobytes()
        boxes = boxes_of(source, vocab_size, path)
        assert len(boxes) > 2
        if vocab_size > TOKENS:
            assert any(start < TOKENS < stop for start, stop in boxes)
            assert any(start > TOKENS for start, _ in boxes)


# ---- Whole numbers


# The largest number up to which float32 has all whole numbers.
LARGEST = 2**24


@pytest.fixture
def numbers(tmp_path: Path) -> Any:
    """A function that writes a table of whole numbers, and finds it as a float32 leaf."""

    def find(dtype: str, values: Array) -> tuple[Path, StoredTensor]:
        directory = stored.write(tmp_path / "numbers", {"m.tid2eid": (dtype, values)}, {})
        rule = Rule("m.tid2eid", values.shape, "table", (), ("a", "b")[: values.ndim], dtype="float32")
        return directory, only_source(directory, rule)

    return find


@pytest.mark.parametrize(("dtype", "stored_as"), [("I32", np.int32), ("I64", np.int64)])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 3), (4, 5)])
def test_whole_numbers_are_exact(numbers: Any, dtype: str, stored_as: Any, start: int, stop: int) -> None:
    values = np.array(
        [[0, 1, -1], [255, 384, 1000], [LARGEST, LARGEST - 1, -LARGEST], [7, 2**23 + 1, -(2**20)], [1, 2, 3]]
    )
    directory, tensor = numbers(dtype, values.astype(stored_as))
    assert isinstance(tensor.codec, plain.Integers)
    prepared = stored.prepare(directory, tensor, start, stop)
    assert sum(array.nbytes for array in prepared) == tensor.prepared_bytes(stop - start)
    for found in (
        decoded(tensor, prepared, "float32"),
        definition.rows(Directory(str(directory)), tensor, start, stop),
    ):
        assert found.dtype == np.float32
        assert found.astype(np.int64).tolist() == values[start:stop].tolist()


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        *(
            (dtype, number)
            for dtype in ("I32", "I64")
            for number in (LARGEST + 1, -LARGEST - 1, LARGEST + 2, 2**31 - 1)
        ),
        *(("I64", number) for number in (2**53 + 1, 2**63 - 1, -(2**63) + 1)),
    ],
)
def test_numbers_that_float32_does_not_have(numbers: Any, dtype: str, number: int) -> None:
    values = np.array([[3, 4], [5, number]], np.int32 if dtype == "I32" else np.int64)
    directory, tensor = numbers(dtype, values)
    stored.prepare(directory, tensor, 0, 1)
    with pytest.raises(UnsupportedFormatError) as caught:
        stored.prepare(directory, tensor, 0, 2)
    assert (
        f"model.safetensors: tensor 'm.tid2eid' holds {number}; float32 has every whole number up to {LARGEST}"
        in str(caught.value)
    )


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """Only where the result is float32: in bfloat16 they would be rounded."""
    directory = stored.write(tmp_path, {"m.weight": ("I64", np.array([[1, 2]]))}, {})
    rule = Rule("m.weight", (1, 2), "table", (), ("a", "b"))
    with pytest.raises(PlanErrors, match=r"tensor 'm.weight' is stored as I64\[1, 2\].*not supported"):
        only_source(directory, rule)


def test_whole_numbers_of_another_shape(tmp_path: Path) -> None:
    directory = stored.write(tmp_path, {"m.tid2eid": ("I64", np.array([[1, 2]]))}, {})
    with pytest.raises(PlanErrors, match=r"tensor 'm.tid2eid' has shape \[1, 2\], but config.json gives \[2, 1\]"):
        only_source(directory, Rule("m.tid2eid", (2, 1), "table", (), ("a", "b"), dtype="float32"))


def test_a_number_too_large_ends_a_conversion(slicecast: Any, tmp_path: Path) -> None:
    """Planning reads headers only, so it is found on the way: one clear error, and no checkpoint in the end."""
    tensors: Mapping[str, Any] = tiny_models.tensors(tiny_models.model("deepseek-v4"), 1)
    name = next(name for name in tensors if name.endswith("tid2eid"))
    tensors[name][1][-1, -1] = LARGEST + 1
    source = stored.write(tmp_path / "source", tensors, tiny_models.CONFIGS["deepseek-v4"])
    flags = [f"--hf_model_path={source}", f"--base_output_directory={tmp_path / 'output'}", "--scan_layers=false"]
    done = slicecast.run("convert", *flags, check=False)
    assert done.returncode == 1
    assert (
        f"model.safetensors: tensor '{name}' holds {LARGEST + 1}; float32 has every whole number up to {LARGEST}"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert not (tmp_path / "output" / "0").exists()
