"""Conversions of a model in every kind of format, from the command line, on eight devices and within little memory."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import stored

from slicecast.convert.source.checkpoint import open_checkpoint

MODULE = "model.layers.1.mlp.up_proj"

# Cuts the projections into boxes of twelve rows, as those of large models are cut.
SMALL_BOXES = """
from slicecast.convert import tiles
tiles.COLUMN_BYTES = 1000
tiles.REQUEST_BYTES = tiles.SMALL_BYTES = 32
"""

LAST_STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def llama(make_checkpoint: Callable[..., Path]) -> Path:
    """The model that is stored in each format. Not to be changed."""
    return make_checkpoint(**samples.LLAMA)


@pytest.mark.parametrize(
    "name",
    [
        "fp8 blocks",
        "mxfp8",
        "int8 asymmetric",
        "int6 asymmetric",
        "int4 asymmetric",
        "mxfp4 f4",
        "nvfp4",
        "nvfp4 modelopt",
    ]
    + ["gptq v1", "gptq desc_act", "awq", "bnb nested", "mlx"],
)
def test_conversion_and_verification(slicecast: Any, llama: Path, tmp_path: Path, name: str) -> None:
    """What the chips computed from boxes of a few rows is what NumPy computes from whole tensors."""
    source, output = samples.in_a_llama(llama, name, tmp_path / "source"), tmp_path / "output"
    tensor = stored.find(source, f"{MODULE}.weight", (samples.OUT, samples.COLUMNS))
    arguments = ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}"]
    arguments += ["--host_memory_gb=0.00003", "--simulated_cpu_devices_count=8"]
    done = slicecast.run(*arguments, prelude=SMALL_BOXES)
    assert f"4 x {tensor.codec.description}" in done.stderr
    assert re.search(r"\d\d waves written", done.stderr)
    done = slicecast.run("verify", output, f"--hf_model_path={source}", prelude=SMALL_BOXES)
    assert "all equal to the source, bit for bit" in done.stdout


def replaced_in_state(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Spoils the state of the last weight: other fields."""

    def spoil(tensors: dict[str, Any]) -> None:
        content = json.loads(tensors[LAST_STATE][1].tobytes())
        tensors[LAST_STATE] = samples.state(**content | fields)

    return spoil


def order(first: int) -> Callable[[dict[str, Any]], None]:
    """Spoils the order of the inputs of the last weight: the first one's group."""

    def spoil(tensors: dict[str, Any]) -> None:
        dtype, groups = tensors[f"{MODULE}.g_idx"]
        tensors[f"{MODULE}.g_idx"] = dtype, np.concatenate([[np.int32(first)], groups[1:]])

    return spoil


def global_scale(value: float) -> Callable[[dict[str, Any]], None]:
    """Spoils the global scale of the last weight."""

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[f"{MODULE}.weight_global_scale"] = "F32", np.array([value], np.float32)

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("bnb nf4", replaced_in_state(shape=[64, 24]), ("[64, 24]", "[24, 64]", "config.json")),
        ("gptq desc_act", order(2), ("g_idx", "the groups 0 to 2", "2 groups")),
        ("gptq desc_act", order(-1), ("g_idx", "the groups -1 to 1", "2 groups")),
        ("nvfp4", global_scale(1e-38), ("global scale", "1e-38")),
    ],
)
def test_contents_that_contradict_their_headers(
    slicecast: Any,
    llama: Path,
    tmp_path: Path,
    name: str,
    spoil: Callable[[dict[str, Any]], None],
    words: tuple[str, ...],
) -> None:
    """Planning reads headers only, so these are found on the way: one clear error, and no checkpoint in the end."""
    source, output = samples.in_a_llama(llama, name, tmp_path / "source", spoil=spoil), tmp_path / "output"
    weight = next(iter(samples.SAMPLES[name].tensors)).removeprefix("m.")
    arguments = ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}"]
    done = slicecast.run(*arguments, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("slicecast: ")]
    for word in (f"model.safetensors: tensor '{MODULE}.{weight}' has", *words):
        assert word in line
    assert not (output / "0").exists()


def test_the_models_are_as_the_samples(llama: Path, tmp_path: Path) -> None:
    """What the tests above convert is what they say."""
    source = samples.in_a_llama(llama, "gptq desc_act", tmp_path / "source")
    tensors = open_checkpoint(str(source)).tensors
    assert sum(name.endswith("qweight") for name in tensors) == 4
    assert sum(tensor.dtype == "BF16" for tensor in tensors.values()) == len(tensors) - 4 * 4
