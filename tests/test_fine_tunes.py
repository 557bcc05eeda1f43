"""Checkpoints that are not quite the published ones: tied or not, another vocabulary, tensors missing or added."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import stored
import tiny_models

from slicecast.configs import families
from slicecast.convert import orbax_checkpoint

HEAD, EMBEDDING = "params/params/decoder/logits_dense/kernel", "params/params/token_embedder/embedding"

Convert = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def convert(slicecast: Any, tmp_path: Path) -> Convert:
    """Converts and verifies a directory, and reads the result."""

    def run(source: Path, *flags: str) -> dict[str, np.ndarray]:
        output = tmp_path / "output"
        shutil.rmtree(output, ignore_errors=True)
        arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", *flags]
        slicecast.run("convert", *arguments, "--simulated_cpu_devices_count=2")
        slicecast.run("verify", output, f"--hf_model_path={source}")
        return {path: array.read().result() for path, array in orbax_checkpoint.open_arrays(output).items()}

    return run


def refused(slicecast: Any, source: Path, *flags: str) -> str:
    """The message with which a directory is refused."""
    done = slicecast.run("plan", f"--hf_model_path={source}", *flags, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def edited(directory: Path, name: str, *, drop: str = "", **added: np.ndarray) -> Path:
    """A tiny model without the tensors whose names end so, and with others (`__` stands for a dot)."""
    tensors = tiny_models.tensors(tiny_models.model(name), 5)
    tensors = {key: value for key, value in tensors.items() if not drop or not key.endswith(drop)}
    tensors |= {key.replace("__", "."): ("BF16", value) for key, value in added.items()}
    return stored.write(directory, tensors, tiny_models.CONFIGS[name])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(ml_dtypes.bfloat16)


# ---- Tied embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_tied_and_untied(convert: Convert, tmp_path: Path, name: str, tied: bool) -> None:
    """A tied Qwen has no output layer in MaxText either; all of its Llamas have one, which then holds the embedding."""
    source = tiny_models.write(tmp_path / "source", name, changes={"tie_word_embeddings": tied})
    found = convert(source)
    assert (HEAD in found) == (not tied or name == "llama")
    if tied and name == "llama":
        np.testing.assert_array_equal(found[HEAD], found[EMBEDDING].T)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_an_output_layer_that_the_config_ties_is_left_out(
    slicecast: Any, convert: Convert, tmp_path: Path, name: str
) -> None:
    """It repeats the embedding; the plan says so. See test_copies.py for one that does not."""
    config = tiny_models.CONFIGS[name] | {"tie_word_embeddings": True}
    tensors = tiny_models.tensors(families.recognize(config), 5)
    embedding = tensors["model.embed_tokens.weight"][1]
    source = stored.write(tmp_path / "source", tensors | {"lm_head.weight": ("BF16", embedding)}, config)
    plan = json.loads(slicecast.run("plan", f"--hf_model_path={source}", "--json").stdout)
    assert [each["why"] for each in plan["ignored"]] == ["config.json ties the output layer to the embedding"]
    np.testing.assert_array_equal(convert(source)[EMBEDDING], embedding)


def test_an_output_layer_that_is_missing(slicecast: Any, tmp_path: Path) -> None:
    message = refused(slicecast, edited(tmp_path / "source", "qwen3", drop="lm_head.weight"))
    assert "MissingTensorError" in message
    assert "'lm_head.weight'" in message


# ---- The vocabulary


def test_another_vocabulary_is_converted_as_it_is(convert: Convert, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", "llama", changes={"vocab_size": 61})
    assert convert(source)[EMBEDDING].shape == (61, 24)


def test_a_vocabulary_that_the_config_does_not_have(slicecast: Any, tmp_path: Path) -> None:
    tensors = tiny_models.tensors(tiny_models.model("llama"), 5)
    source = stored.write(tmp_path / "source", tensors, tiny_models.CONFIGS["llama"] | {"vocab_size": 61})
    message = refused(slicecast, source)
    assert "ShapeError" in message
    assert "'model.embed_tokens.weight' has shape [56, 24], but config.json gives [61, 24]" in message


@pytest.mark.parametrize("vocab_size", [56, 64, 128, 50])
def test_the_vocabulary_of_the_model(slicecast: Any, convert: Convert, tmp_path: Path, vocab_size: int) -> None:
    """Rows of zeros are added, or the last rows left out, in both places; the plan says so."""
    source = tiny_models.write(tmp_path / "source", "llama", seed=5)
    whole = tiny_models.tensors(tiny_models.model("llama"), 5)
    found = convert(source, f"--vocab_size={vocab_size}")
    kept = min(vocab_size, 56)
    for name, values in (("model.embed_tokens.weight", found[EMBEDDING]), ("lm_head.weight", found[HEAD].T)):
        assert values.shape == (vocab_size, 24)
        np.testing.assert_array_equal(values[:kept], whole[name][1][:kept])
        assert not values[kept:].any()
    plan = json.loads(slicecast.run("plan", f"--hf_model_path={source}", f"--vocab_size={vocab_size}", "--json").stdout)
    notes = [note for note in plan["notes"] if "tokens" in note]
    expected = {64: "rows of zeros are added", 128: "rows of zeros are added", 50: "last rows are left out"}
    assert len(notes) == (vocab_size in expected)
    assert all(expected[vocab_size] in note for note in notes)


# ---- Tensors missing or added


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("gpt-oss", "model.layers.1.self_attn.o_proj.bias"),
        ("deepseek-v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_a_missing_bias_is_an_error(slicecast: Any, tmp_path: Path, name: str, missing: str) -> None:
    """MaxText's model has it, and zeros would be a guess."""
    message = refused(slicecast, edited(tmp_path / "source", name, drop=missing))
    assert "MissingTensorError" in message
    assert f"'{missing}'" in message


def test_an_added_tensor_is_an_error_unless_it_is_ignored(slicecast: Any, convert: Convert, tmp_path: Path) -> None:
    source = edited(tmp_path / "source", "llama", value_head__weight=noise(1, 24), value_head__bias=noise(1))
    message = refused(slicecast, source)
    assert "UnusedTensorError" in message
    for name in ("value_head.weight", "value_head.bias"):
        assert f"'{name}'" in message
    assert "--ignore_extra" in message
    # The whole name must match, and of both.
    assert "'value_head.bias'" in refused(slicecast, source, r"--ignore_extra=value_head\.weight")
    assert "'value_head.bias'" in refused(slicecast, source, "--ignore_extra=value")
    found = convert(source, r"--ignore_extra=value_head\..*")
    assert not [path for path in found if "value" in path and "self_attention" not in path]
    plan = json.loads(slicecast.run("plan", f"--hf_model_path={source}", r"--ignore_extra=value_.*", "--json").stdout)
    assert plan["ignored"] == [{"why": "--ignore_extra=value_.*", "tensors": 2, "bytes": 50}]


def test_what_the_model_needs_cannot_be_ignored(convert: Convert, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", "llama")
    assert convert(source, "--ignore_extra=.*").keys() == convert(source).keys()


def test_a_pattern_that_is_none(slicecast: Any, tmp_path: Path) -> None:
    message = refused(slicecast, tmp_path, "--ignore_extra=value_head(")
    assert "'value_head(' is no regular expression" in message
