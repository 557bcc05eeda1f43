"""One model stored in different forms converts to the same leaves: experts alone or together, either way around."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
import tiny_models

from slicecast.configs import families
from slicecast.convert import orbax_checkpoint
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping.rules import ModelOptions

Tensors = dict[str, tuple[str, np.ndarray]]


def separate(tensors: Tensors, experts: int) -> Tensors:
    """Fused experts one by one: rows of the gate before those of the up projection."""
    found = {}
    for name, (dtype, values) in tensors.items():
        module, _, leaf = name.rpartition(".")
        for expert in range(experts if leaf in ("gate_up_proj", "down_proj") and "experts" in name else 0):
            gate, up = np.split(values[expert], 2)
            parts = {"gate_proj": gate, "up_proj": up} if leaf == "gate_up_proj" else {"down_proj": values[expert]}
            found |= {f"{module}.{expert}.{part}.weight": (dtype, value) for part, value in parts.items()}
        if leaf not in ("gate_up_proj", "down_proj") or "experts" not in name:
            found[name] = (dtype, values)
    return found


def inputs_first(tensors: Tensors) -> Tensors:
    """Fused experts as `[experts, in, out]`."""
    return {
        name: (dtype, values.swapaxes(1, 2) if values.ndim == 3 and "experts" in name else values)
        for name, (dtype, values) in tensors.items()
    }


def fused(tensors: Tensors, experts: int) -> Tensors:
    """Experts that are tensors of their own, in one."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    modules = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for module in modules:
        names = [f"{module}.experts.{expert}" for expert in range(experts)]
        gate, up, down = (
            np.stack([tensors[f"{name}.{part}_proj.weight"][1] for name in names]) for part in ("gate", "up", "down")
        )
        found[f"{module}.experts.gate_up_proj"] = ("BF16", np.concatenate([gate, up], axis=1))
        found[f"{module}.experts.down_proj"] = ("BF16", down)
    return found


@pytest.mark.parametrize("name", ["qwen3 moe", "qwen3.5", "qwen3-next", "qwen3-vl moe", "qwen3-omni"])
def test_forms_of_experts(slicecast: Any, tmp_path: Path, name: str) -> None:
    config, experts = tiny_models.CONFIGS[name], 6
    published = tiny_models.tensors(tiny_models.model(name), 11)
    outputs_first = fused(published, experts) if not any("gate_up_proj" in key for key in published) else published
    if name == "qwen3-vl moe":
        outputs_first = inputs_first(published)
    forms = {"published": published, "fused": outputs_first, "separate": separate(outputs_first, experts)}
    if name in ("qwen3.5", "qwen3 moe", "qwen3-next", "qwen3-omni"):
        del forms["fused" if name == "qwen3.5" else "separate"]  # It is what is published.
    results = []
    for form, tensors in forms.items():
        source, output = stored.write(tmp_path / form, tensors, config), tmp_path / "output"
        shutil.rmtree(output, ignore_errors=True)
        arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", "--scan_layers=false"]
        slicecast.run("convert", *arguments, "--simulated_cpu_devices_count=2")
        slicecast.run("verify", output, f"--hf_model_path={source}")
        arrays = orbax_checkpoint.open_arrays(output)
        results.append({path: array.read().result().tobytes() for path, array in arrays.items()})
    assert len(results) >= 2
    assert all(result == results[0] for result in results)


def test_half_of_an_expert_is_read_alone(slicecast: Any, tmp_path: Path) -> None:
    """Each byte once: rows of the gate for one leaf, those of the up projection for the other."""
    source = tiny_models.write(tmp_path / "source", "qwen3.5")
    plan = slicecast.run("plan", f"--hf_model_path={source}").stdout
    assert "each byte by one host" in plan
    source = tiny_models.write(tmp_path / "llama4", "llama4")
    assert "again, for a second leaf" in slicecast.run("plan", f"--hf_model_path={source}").stdout


@pytest.mark.parametrize("option", ["use_multimodal", "enable_mtp"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "olmo3", "gpt-oss", "deepseek-v4"])
def test_parts_that_a_model_does_not_have(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"--{option}: .* Leave the flag out"):
        families.recognize(tiny_models.CONFIGS[name], ModelOptions(**{option: True}))
