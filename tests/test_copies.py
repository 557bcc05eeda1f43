"""Tensors that are left out as repetitions of others: they are, or nothing is written."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
import tiny_models

from slicecast.configs import families
from slicecast.convert import copies, plan
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import Ignore, ModelOptions
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import GB, Machine
from slicecast.convert.plan import Plan
from slicecast.convert.source.checkpoint import open_checkpoint

EMBEDDINGS = {
    "llama tied": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "gemma2": "model.embed_tokens.weight",
    "gemma4": "model.language_model.embed_tokens.weight",
}


def write(directory: Path, name: str, change: str) -> Path:
    """A tiny model that ties its output layer, and stores one all the same, which repeats the embedding or not."""
    tensors = tiny_models.tensors(tiny_models.model(name), 1)
    dtype, values = tensors[EMBEDDINGS[name]]
    head = values.copy()
    if change == "the last value":
        head[-1, -1] += 1
    elif change == "the shape":
        head = head[:-1]
    elif change == "the dtype":
        dtype, head = "F32", head.astype(np.float32)
    return stored.write(directory, tensors | {"lm_head.weight": (dtype, head)}, tiny_models.CONFIGS[name])


def planned(directory: Path, *, ignore: str | None = None, options: ModelOptions = ModelOptions()) -> Plan:  # noqa: B008
    checkpoint = open_checkpoint(str(directory))
    model = families.recognize(checkpoint.config, options)
    if ignore is not None:
        model = dataclasses.replace(model, ignores=(*model.ignores, Ignore(ignore, "the user says so")))
    layout = Layout(scan_layers=not model.unscanned_only)
    resolved, ignored = resolve.resolve(checkpoint, model, layout, None)
    return plan.make(checkpoint, model, layout, "", resolved, ignored, Machine(1, 1, GB, None))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_tied_output_layer_that_repeats_the_embedding_is_left_out(tmp_path: Path, name: str) -> None:
    made = planned(write(tmp_path, name, "nothing"))
    (pair,) = (pair for ignored in made.ignored for pair in ignored.copies)
    assert [tensor.name for tensor in pair] == ["lm_head.weight", EMBEDDINGS[name]]
    copies.check(made)


@pytest.mark.parametrize("change", ["the last value", "the shape", "the dtype"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_one_that_does_not_is_refused(tmp_path: Path, name: str, change: str) -> None:
    made = planned(write(tmp_path, name, change))
    with pytest.raises(ConfigError, match=r"'lm_head.weight' is left out .* should repeat 'model\..*embed_tokens"):
        copies.check(made)


@pytest.mark.parametrize("wrong", [None, "embed_tokens", "shared_head.head"])
def test_copies_of_a_prediction_layer(tmp_path: Path, wrong: str | None) -> None:
    options = ModelOptions(enable_mtp=True)
    tensors = tiny_models.tensors(tiny_models.model("deepseek-v3", options), 1)
    layer = tiny_models.CONFIGS["deepseek-v3"]["num_hidden_layers"]
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        dtype, values = tensors[f"{original}.weight"]
        tensors[f"model.layers.{layer}.{copy}.weight"] = (dtype, values[::-1] if copy == wrong else values)
    made = planned(stored.write(tmp_path, tensors, tiny_models.CONFIGS["deepseek-v3"]), options=options)
    assert sum(len(ignored.copies) for ignored in made.ignored) == 2
    if wrong is None:
        copies.check(made)
        return
    with pytest.raises(ConfigError, match=rf"'model.layers.{layer}.{wrong}.weight' is left out"):
        copies.check(made)


def test_whoever_leaves_it_out_decides(tmp_path: Path) -> None:
    copies.check(planned(write(tmp_path, "llama tied", "the last value"), ignore=r"lm_head\.weight"))


def test_what_only_the_runtime_uses_is_no_copy(tmp_path: Path) -> None:
    """An activation scale, which no rule of the family names."""
    tensors = tiny_models.tensors(tiny_models.model("llama"), 1)
    tensors["model.layers.0.mlp.up_proj.input_scale"] = ("F32", np.ones(1, np.float32))
    made = planned(stored.write(tmp_path, tensors, tiny_models.CONFIGS["llama"]))
    assert [(ignored.count, ignored.copies) for ignored in made.ignored] == [(1, ())]


@pytest.mark.parametrize("where", range(5))
def test_processes_share_the_work(tmp_path: Path, where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that differs is found by exactly one of them, wherever it is."""
    directory = write(tmp_path, "llama tied", "nothing")
    made = planned(directory)
    pairs = [pair for ignored in made.ignored for pair in ignored.copies]
    left_out = pairs[0][0]
    monkeypatch.setattr(copies, "_PIECE_BYTES", left_out.nbytes // 5 + 1)
    with (directory / left_out.file).open("r+b") as file:
        file.seek(left_out.offset + where * (left_out.nbytes - 1) // 4)
        (before,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes((before ^ 1,)))
    assert sum(finds(made, pairs, process, 3) for process in range(3)) == 1


def finds(made: Plan, pairs: Any, process: int, processes: int) -> bool:
    """Whether a process finds a difference."""
    try:
        copies._check(made, pairs, process, processes)
    except ConfigError:
        return True
    return False


def test_nothing_is_written(slicecast: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama tied", "the last value")
    output = tmp_path / "output"
    done = slicecast.run("convert", f"--hf_model_path={source}", f"--base_output_directory={output}", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("slicecast: ConfigError: model.safetensors: tensor 'lm_head.weight'")
    assert not output.exists()
    arguments = ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}"]
    slicecast.run(*arguments, "--ignore_extra=lm_head.weight")
