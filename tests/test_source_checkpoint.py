"""Opening checkpoints: valid ones, every way to be wrong, and the whole of Kimi-K2.6 as headers."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slicecast.convert.errors import (
    ConfigError,
    DuplicateTensorError,
    HeaderError,
    MissingFileError,
    OffsetError,
    PlanErrors,
    ReadError,
    SlicecastError,
    TruncatedFileError,
    UsageError,
)
from slicecast.convert.source.checkpoint import Checkpoint, fingerprint, open_checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.reader import Reader, Span

INDEX = "model.safetensors.index.json"
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"


def array(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, seed + 1)).astype(np.float32)


def write(directory: Path, files: Mapping[str, Sequence[str]], *, index: bool | Mapping[str, Any] = True) -> Path:
    """Writes float32 tensors of the given names; `index` is made from the files, given, or left out."""
    seeds = itertools.count(1)
    for file, names in files.items():
        save_file({name: array(next(seeds)) for name in names}, directory / file)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    if index is True:
        index = {"metadata": {"total_size": 1}, "weight_map": {name: f for f, names in files.items() for name in names}}
    if index:
        (directory / INDEX).write_text(json.dumps(index))
    return directory


def failures(directory: Path) -> tuple[SlicecastError, ...]:
    """Opens a checkpoint that is wrong. Each message must name what was found, expected, and what to do."""
    with pytest.raises(PlanErrors) as error:
        open_checkpoint(str(directory))
    for one in error.value.errors:
        assert "found" in str(one)
        assert "expected" in str(one)
        assert any(word in str(one) for word in ("ownload", "emove", "Check"))
        assert str(one) in str(error.value)
    return error.value.errors


def failure(directory: Path, kind: type[SlicecastError], *words: str) -> None:
    """Like `failures`, for exactly one of type `kind` whose message holds `words`."""
    (error,) = failures(directory)
    assert type(error) is kind
    for word in words:
        assert word in str(error)


# ---- Valid checkpoints


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ({"model.safetensors": ["b.weight", "a.weight"]}, False),
        ({"model.safetensors": ["b.weight", "a.weight"]}, True),
        ({"x.safetensors": ["b.weight"], "y.safetensors": ["a.weight", "c.weight"]}, False),
        ({"x.safetensors": ["b.weight"], "y.safetensors": ["a.weight", "c.weight"]}, True),
    ],
)
def test_valid_checkpoints(tmp_path: Path, files: dict[str, list[str]], index: bool) -> None:
    write(tmp_path, files, index=index)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.path == str(tmp_path)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.side_configs == {}
    assert checkpoint.file_sizes == {file: os.path.getsize(tmp_path / file) for file in files}
    assert list(checkpoint.tensors) == sorted(name for names in files.values() for name in names)
    reader, total = Reader(checkpoint.storage), 0
    for file in files:
        for name, value in load_file(tmp_path / file).items():
            tensor = checkpoint.tensors[name]
            assert (tensor.name, tensor.file, tensor.dtype, tensor.shape) == (name, file, "F32", value.shape)
            (data,) = reader.read([Span(tensor.file, tensor.offset, tensor.nbytes)])
            assert data.tobytes() == value.tobytes()
            total += value.nbytes
    assert checkpoint.total_bytes == total


def test_path_may_be_a_file_url_and_end_with_a_slash(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    expected = fingerprint(open_checkpoint(str(tmp_path)))
    assert fingerprint(open_checkpoint(f"{tmp_path}/")) == expected
    assert fingerprint(open_checkpoint(f"file://{tmp_path}")) == expected


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write(blobs, {"model.safetensors": ["a"]})
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert fingerprint(open_checkpoint(str(snapshot))) == fingerprint(open_checkpoint(str(blobs)))


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    (tmp_path / "consolidated.safetensors").write_bytes(b"damaged")
    assert list(open_checkpoint(str(tmp_path)).file_sizes) == ["x.safetensors"]


def test_side_configs(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    plain = open_checkpoint(str(tmp_path))
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.side_configs == {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}
    assert fingerprint(checkpoint) != fingerprint(plain)


# ---- The directory and its configs


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"moonshotai/Kimi-K2.6.*found nothing.*expected a directory.*Give"):
        open_checkpoint(str(tmp_path / "moonshotai/Kimi-K2.6"))


def test_file_instead_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    with pytest.raises(MissingFileError, match=r"model.safetensors: found a file, expected a directory.*Give"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("path", ["ftp://host/model", "abfs://container/model"])
def test_urls_that_cannot_be_read(path: str) -> None:
    with pytest.raises(UsageError, match=f"{path}: '.*://' cannot be read; a directory, gs://"):
        open_checkpoint(path)


def test_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ReadError, match=r"Permission denied.*expected a readable directory. Check"):
        open_checkpoint(str(tmp_path))


def test_missing_config(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    (tmp_path / "config.json").unlink()
    failure(tmp_path, MissingFileError, "config.json", str(tmp_path))


BAD_JSON = [b"", b"{", b"\xff", b"nonsense", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"]


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("content", [*BAD_JSON, b"[]", b"null", b'{"a": 1, "a": 1}'], ids=lambda c: c[:12])
def test_config_that_is_no_json_object(tmp_path: Path, file: str, content: bytes) -> None:
    write(tmp_path, {"model.safetensors": ["a"]})
    (tmp_path / file).write_bytes(content)
    failure(tmp_path, ConfigError, file, "Download it again")


# ---- Files


def test_empty_directory(tmp_path: Path) -> None:
    write(tmp_path, {}, index=False)
    failure(tmp_path, MissingFileError, str(tmp_path), "no .safetensors files,", INDEX)


def test_other_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, {}, index=False)
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.json"):
        (tmp_path / name).touch()
    failure(tmp_path, MissingFileError, "'model.pt', 'pytorch_model.bin'", "safetensors version of the checkpoint")


def test_files_that_the_index_names_are_missing(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"], "y.safetensors": ["b", "c", "d"], "z.safetensors": ["e"]})
    (tmp_path / "y.safetensors").unlink()
    (tmp_path / "z.safetensors").unlink()
    one, two = failures(tmp_path)
    assert type(one) is type(two) is MissingFileError
    assert "y.safetensors: found no such file, expected it to hold 3 tensors" in str(one)
    assert "z.safetensors: found no such file, expected it to hold 1 tensors" in str(two)


def test_link_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "blob")
    failure(tmp_path, MissingFileError, "x.safetensors")


def test_directory_with_the_name_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "x.safetensors").mkdir()
    failure(tmp_path, ReadError, "x.safetensors")


@pytest.mark.parametrize(
    ("keep", "kind", "word"),
    [
        (0, TruncatedFileError, "found 0 bytes"),
        (7, TruncatedFileError, "found 7 bytes"),
        (8, TruncatedFileError, "found 8 bytes"),
        (60, TruncatedFileError, "found 60 bytes"),
        (-1, TruncatedFileError, "1 bytes too short"),
    ],
)
def test_truncated_file(tmp_path: Path, keep: int, kind: type[SlicecastError], word: str) -> None:
    write(tmp_path, {"x.safetensors": ["a"], "y.safetensors": ["b"]})
    file = tmp_path / "y.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    failure(tmp_path, kind, "y.safetensors", word, "Download the file again")


def test_longer_file(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    with open(tmp_path / "x.safetensors", "ab") as file:
        file.write(b"12")
    failure(tmp_path, TruncatedFileError, "x.safetensors", "'a'", "2 bytes too long", "Download the file again")


def test_errors_of_all_files_come_together(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}.safetensors": [name] for name in "abcdefghijklmnop"})
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "c.safetensors").unlink()
    (tmp_path / "n.safetensors").write_bytes(b"123")
    header = json.dumps({"o": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}).encode()
    (tmp_path / "o.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(PlanErrors) as error:
        open_checkpoint(str(tmp_path))
    found = [(type(one), str(one)[:13]) for one in error.value.errors]
    assert found == [
        (ConfigError, "config.json: "),
        (HeaderError, "a.safetensors"),
        (TruncatedFileError, "n.safetensors"),
        (OffsetError, "o.safetensors"),
        (MissingFileError, "c.safetensors"),
    ]


# ---- Files and index


@pytest.mark.parametrize("content", [*BAD_JSON, b"[]", b"null"], ids=lambda c: c[:12])
def test_index_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    (tmp_path / INDEX).write_bytes(content)
    failure(tmp_path, HeaderError, INDEX, "Download it again")


@pytest.mark.parametrize("index", [{"metadata": {}}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_index_without_a_map(tmp_path: Path, index: dict[str, Any]) -> None:
    write(tmp_path, {"x.safetensors": ["a"]}, index=index)
    failure(tmp_path, HeaderError, INDEX, "weight_map", "Download it again")


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}')
    failure(tmp_path, DuplicateTensorError, INDEX, "'a'", "Download it again")


BAD_FILES = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "sub\\x.safetensors", "..safetensors"]
BAD_FILES += ["x.bin", "", "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors"]


@pytest.mark.parametrize("file", [*BAD_FILES, 1, None, ["x.safetensors"]], ids=repr)
def test_index_that_names_something_else_than_a_file_beside_it(tmp_path: Path, file: Any) -> None:
    write(tmp_path, {"x.safetensors": ["a"]}, index={"weight_map": {"a.weight": file}})
    failure(tmp_path, HeaderError, INDEX, "'a.weight'", repr(file), "Download the index again")
    str(failures(tmp_path)[0]).encode()


def test_index_and_a_single_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    save_file({"a": array(9)}, tmp_path / "model.safetensors")
    failure(tmp_path, HeaderError, INDEX, "model.safetensors beside it", "Remove the one that is not meant")


def test_header_lacks_what_the_index_promises(tmp_path: Path) -> None:
    names = ["a", "b0", "b1", "b2", "b3", "b4"]
    weight_map = {name: "x.safetensors" for name in names}
    write(tmp_path, {"x.safetensors": ["a"]}, index={"weight_map": weight_map})
    failure(tmp_path, HeaderError, "x.safetensors", "'b0', 'b1', 'b2' and 2 more", INDEX, "Download the file and the")


def test_header_holds_what_the_index_does_not_name(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors"}}
    write(tmp_path, {"x.safetensors": ["a", "b.weight_scale"]}, index=index)
    failure(tmp_path, HeaderError, "x.safetensors", "'b.weight_scale'", INDEX, "Download the file and the index again")


def test_tensor_lies_in_another_file_than_the_index_says(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}
    write(tmp_path, {"x.safetensors": ["a"], "y.safetensors": ["b", "c"]}, index=index)
    failure(tmp_path, HeaderError, "x.safetensors", "'b'", INDEX)


@pytest.mark.parametrize("index", [True, False])
def test_tensor_in_two_files(tmp_path: Path, index: bool) -> None:
    write(tmp_path, {"x.safetensors": ["a", "b"], "y.safetensors": ["b", "c"]}, index=index)
    failure(tmp_path, DuplicateTensorError, "x.safetensors and y.safetensors", "'b'", "Remove the file")


# ---- Fingerprint


def test_fingerprint_depends_on_all_that_a_plan_does(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a", "b"]})
    checkpoint = open_checkpoint(str(tmp_path))
    a, b = checkpoint.tensors["a"], checkpoint.tensors["b"]

    def with_a(**changes: Any) -> Checkpoint:
        changed = replace(a, **changes)
        return replace(checkpoint, tensors={changed.name: changed, "b": b})

    variants = [
        checkpoint,
        replace(checkpoint, config={"model_type": "llama", "x": None}),
        replace(checkpoint, side_configs={"quantize_config.json": {}}),
        replace(checkpoint, file_sizes={"x.safetensors": 1}),
        replace(checkpoint, tensors={"a": a}),
        *(with_a(name="c"), with_a(file="y.safetensors"), with_a(dtype="I32")),
        *(with_a(shape=a.shape[::-1]), with_a(offset=a.offset + 1)),
    ]
    prints = [fingerprint(variant) for variant in variants]
    assert len(set(prints)) == len(variants)
    assert all(len(value) == 64 and int(value, 16) for value in prints)


def test_fingerprint_depends_on_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, {"x.safetensors": ["a", "b"], "y.safetensors": ["c"]})
    checkpoint = replace(open_checkpoint(str(tmp_path)), config={"a": 1, "b": {"c": 2, "d": 3}})
    other = replace(
        checkpoint,
        storage=Directory("elsewhere"),
        config={"b": {"d": 3, "c": 2}, "a": 1},
        tensors=dict(reversed(list(checkpoint.tensors.items()))),
        file_sizes=dict(reversed(list(checkpoint.file_sizes.items()))),
    )
    assert fingerprint(other) == fingerprint(checkpoint)


def test_the_path_finds_the_files_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"x.safetensors": ["a"]})
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(".")
    path = checkpoint.path
    monkeypatch.chdir("/")
    assert open_checkpoint(path).tensors == checkpoint.tensors


# ---- Made-up checkpoints (scripts/make_checkpoint.py)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_checkpoint"] = module  # Its dataclasses look themselves up.
    spec.loader.exec_module(module)
    return module


FAMILIES = ["kimi-k2.6", "deepseek", "deepseek-v2-lite", "llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_made_files_are_those_of_the_library(tmp_path: Path, script: ModuleType, family: str) -> None:
    script.write_checkpoint(str(tmp_path / "made"), family=family, files=2)
    checkpoint = open_checkpoint(str(tmp_path / "made"))
    index = json.loads((tmp_path / "made" / INDEX).read_text())
    assert index["weight_map"] == {tensor.name: tensor.file for tensor in checkpoint.tensors.values()}
    assert index["metadata"]["total_size"] == checkpoint.total_bytes
    for file in checkpoint.file_sizes:
        save_file(load_file(tmp_path / "made" / file), tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == (tmp_path / "made" / file).read_bytes()


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_made_tensors_all_differ(tmp_path: Path, script: ModuleType, family: str) -> None:
    script.write_checkpoint(str(tmp_path), family=family)
    values = {name: t for name, t in tensors_of(tmp_path).items() if not name.endswith("weight_shape")}
    assert len({value.tobytes() for value in values.values()}) == len(values)
    for name, value in values.items():
        if value.ndim > 1:
            assert len({row.tobytes() for row in value}) == len(value), f"{name} repeats a row"
        if value.dtype != np.int32:
            assert 1e-4 < np.abs(value.astype(np.float64)).mean() < 10, name


def test_made_values_depend_on_the_seed_and_nothing_else(tmp_path: Path, script: ModuleType) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.write_checkpoint(str(tmp_path / name), seed=seed)
    a, b, c = (
        [(file.name, file.read_bytes()) for file in sorted((tmp_path / name).iterdir())] for name in ("a", "b", "c")
    )
    assert a == b
    assert a != c


def test_made_kimi(tmp_path: Path, script: ModuleType) -> None:
    script.write_checkpoint(str(tmp_path), experts=3, layers=2, hidden=64, moe_intermediate=32)
    checkpoint, values = open_checkpoint(str(tmp_path)), tensors_of(tmp_path)
    assert checkpoint.config["architectures"] == ["KimiK25ForConditionalGeneration"]
    text = checkpoint.config["text_config"]
    assert (text["n_routed_experts"], text["hidden_size"], text["moe_intermediate_size"]) == (3, 64, 32)
    assert r"re:.*mlp\.(gate|up|gate_up|down)_proj.*" in text["quantization_config"]["ignore"]
    packed = [name.removesuffix("_packed") for name in values if name.endswith("weight_packed")]
    assert len(packed) == 9
    strays = []
    for name in packed:
        rows, columns = values[f"{name}_shape"]
        codes, scale = values[f"{name}_packed"], values[f"{name}_scale"]
        assert (rows, columns) == ((64, 32) if "down_proj" in name else (32, 64))
        assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (rows, columns // 8))
        assert (scale.dtype, scale.shape) == (np.dtype(ml_dtypes.bfloat16), (rows, columns // 32))
        assert 0.9e-3 < scale.astype(np.float32).min() <= scale.astype(np.float32).max() < 1.1e-2
        files = {checkpoint.tensors[name + part].file for part in ("_packed", "_scale")}
        strays += [name] if len(files) == 2 else []
    assert "language_model.model.layers.1.mlp.experts.0.gate_proj.weight" in strays
    bias = checkpoint.tensors["language_model.model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (bias.dtype, bias.shape) == ("F32", (3,))


def test_made_checkpoints_are_written_once(tmp_path: Path, script: ModuleType) -> None:
    script.write_checkpoint(str(tmp_path))
    with pytest.raises(SystemExit, match="not empty"):
        script.write_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden": 100}, "multiples of 32"),
        ({"files": 10_000}, "more files"),
        ({"family": "llama", "experts": 8}, "no n_routed_experts"),
        ({"family": "deepseek-v2-lite", "q_lora_rank": 8}, "no q_lora_rank"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, script: ModuleType, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        script.write_checkpoint(str(tmp_path), **flags)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("deepseek", 671_026_419_200), ("deepseek-v2-lite", 15_706_484_224), ("llama", 8_030_261_248)],
)
def test_true_sizes_have_the_published_number_of_parameters(script: ModuleType, family: str, parameters: int) -> None:
    tensors = script.all_tensors(script.make_config(family, {}, true_sizes=True))
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors) == parameters


OPEN_AND_MEASURE = """
import json, sys, time
from slicecast.convert.progress import peak_resident_bytes
from slicecast.convert.source.checkpoint import fingerprint, open_checkpoint

start = time.process_time()
checkpoint = open_checkpoint(sys.argv[1])
seconds = time.process_time() - start
fingerprint(checkpoint)
rss = peak_resident_bytes()  # Not getrusage: its peak includes that of the process that started this one.
print(json.dumps([len(checkpoint.tensors), checkpoint.total_bytes, len(checkpoint.file_sizes), seconds, rss]))
"""


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_whole_of_kimi_opens_quickly_and_in_little_memory(tmp_path: Path) -> None:
    run(str(SCRIPT), "--out", str(tmp_path / "kimi"), "--headers_only", "--files", "64")
    tensors, nbytes, files, seconds, rss = json.loads(run("-c", OPEN_AND_MEASURE, str(tmp_path / "kimi")))
    assert (tensors, files) == (208_550, 64)
    assert nbytes == 595_148_192_736  # 554.3 GiB: the "555 GB" of the published model.
    assert seconds < 15  # Of one core; a loaded machine takes longer by the clock.
    assert rss < 1_000_000_000
