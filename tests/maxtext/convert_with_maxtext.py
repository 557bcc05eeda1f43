"""Converts the sources of cases with MaxText's own converter, in each layout that it can convert to.

    python convert_with_maxtext.py DIR [CASE ...]

Reads `DIR/<case>/hf`, and writes `DIR/<case>/maxtext/<dtype>/<layout>`.
"""

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# MaxText's converter cannot write from a single device. Read when JAX starts, so before the imports below.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import numpy as np
import transformers
from case import Case, Layout
from cases import CASES
from maxtext.checkpoint_conversion import to_maxtext
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS
from safetensors import safe_open

# The converter collects garbage after each leaf, which would take most of the time.
gc.collect = lambda *_: 0


def read_with_numpy(folder: str, **_: Any) -> dict[str, np.ndarray]:
    """Reads a checkpoint as the converter does, whose own function needs torch."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  It is no dictionary.
    return tensors


to_maxtext.load_hf_dict_from_safetensors = read_with_numpy


def convert(case: Case, layout: Layout, save_dtype: str, folder: Path) -> None:
    """Converts the source of one case."""
    # The converter knows the model by name only, and takes its sizes from this table.
    HF_MODEL_CONFIGS[case.model_name] = transformers.AutoConfig.from_pretrained(folder / "hf")
    to_maxtext.main(
        [
            "",
            *case.maxtext_settings(layout),
            f"base_output_directory={folder / 'maxtext' / save_dtype / layout}",
            f"--hf_model_path={folder / 'hf'}",
            f"--save_dtype={save_dtype}",
            f"--lazy_load_tensors={'vision_config' not in (case.wrapper or {})}",
            "--simulated_cpu_devices_count=4",
            "hardware=cpu",
            "override_model_config=true",
            "skip_jax_distributed_system=true",
        ]
    )


def main(arguments: list[str]) -> None:
    out, names = Path(arguments[0]), arguments[1:]
    import time
    for case in CASES:
        for layout in case.layouts:
            for save_dtype in ("bfloat16", "float32"):
                if names and case.name not in names or case.quantization:
                    continue
                t = time.time()
                try:
                    convert(case, layout, save_dtype, out / case.name)
                    print("CONVERTED", case.name, layout, save_dtype, round(time.time() - t, 1), flush=True)
                except BaseException as e:
                    print("FAILED", case.name, layout, save_dtype, repr(e)[:300], flush=True)
                    traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
