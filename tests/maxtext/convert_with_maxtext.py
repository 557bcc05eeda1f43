"""Converts the sources of cases with MaxText's own converter, in each layout that it can write.

    python convert_with_maxtext.py DIR [CASE ...]

Reads `DIR/<case>/hf`, and writes `DIR/<case>/maxtext/<dtype>/<layout>`. A program of its own, because the converter
takes over JAX's devices.
"""

import gc
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

# MaxText's converter cannot write from a single device. Read when JAX starts, so before the imports below.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import numpy as np
import transformers
from case import SAVE_DTYPES, Case, Layout, SaveDtype, output
from cases import CASES
from maxtext.checkpoint_conversion import to_maxtext
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS
from models import qwen
from safetensors import safe_open

# How the published names of Gemma 3 begin, and how the converter expects them to.
_GEMMA3_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_tower\.": "model.vision_tower.vision_model.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}

# The converter collects garbage after each leaf, which would take most of the time.
gc.collect = lambda *_: 0


def _read_source(folder: str, **_: Any) -> dict[str, np.ndarray]:
    """Reads a checkpoint for the converter, whose own function needs torch, in the form that it knows."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  It is no dictionary.
    model_type = transformers.AutoConfig.from_pretrained(folder).model_type
    if model_type == "gemma3":
        for published, expected in _GEMMA3_NAMES.items():
            tensors = {re.sub(published, expected, name): tensor for name, tensor in tensors.items()}
    return qwen.inputs_first(tensors) if model_type == "qwen3_vl_moe" else tensors


def _with_router_bias(mapping: Any) -> Any:
    """Adds the router's bias to the converter's table of DeepSeek-V3, as it stands in that of DeepSeek-V4.

    MaxText 0.2.5 made it a variable of another kind, and the table knows it as a parameter only.
    """

    def with_router_bias(*arguments: Any) -> dict[str, Any]:
        table: dict[str, Any] = mapping(*arguments)
        biases = {name: source for name, source in table.items() if name.endswith("gate-bias")}
        return table | {name.replace("params-", "MoEBiasVar-"): source for name, source in biases.items()}

    return with_router_bias


def _prepare() -> None:
    """Changes what keeps the converter from models that it is meant for."""
    to_maxtext.load_hf_dict_from_safetensors = _read_source
    for name in ("deepseek3-671b", "deepseek3.2-671b"):
        to_maxtext.PARAM_MAPPING[name] = _with_router_bias(to_maxtext.PARAM_MAPPING[name])


def convert(case: Case, layout: Layout, save_dtype: SaveDtype, folder: Path) -> None:
    """Converts the source of one case."""
    # The converter knows the model by name only, and takes its sizes from this table.
    HF_MODEL_CONFIGS[case.model_name] = transformers.AutoConfig.from_pretrained(folder / "hf")
    to_maxtext.main(
        [
            "",
            *(f"{key}={value}" for key, value in case.maxtext_settings(layout).items()),
            f"base_output_directory={output(folder, 'maxtext', save_dtype, layout)}",
            f"--hf_model_path={folder / 'hf'}",
            f"--save_dtype={save_dtype}",
            # It must read all tensors of a model that sees at once.
            f"--lazy_load_tensors={case.wrapper is None}",
            "--simulated_cpu_devices_count=4",
            "hardware=cpu",
            "override_model_config=true",
            "skip_jax_distributed_system=true",
        ]
    )


def main(arguments: list[str]) -> None:
    """Converts all cases, or those named after the folder, in the folder given first."""
    if not arguments:
        sys.exit("usage: convert_with_maxtext.py DIR [CASE ...]")
    out, names = Path(arguments[0]), arguments[1:]
    _prepare()
    for case in CASES:
        if names and case.name not in names:
            continue
        for layout, save_dtype in itertools.product(case.own_converter, SAVE_DTYPES):
            print(f"{case.name}, {layout}, {save_dtype}", flush=True)
            convert(case, layout, save_dtype, out / case.name)


if __name__ == "__main__":
    main(sys.argv[1:])
