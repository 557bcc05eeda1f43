"""Converts a case's source with MaxText's own converter.

    python convert_with_maxtext.py CASE SCAN_LAYERS HF_MODEL_PATH BASE_OUTPUT_DIRECTORY

A program of its own, because the converter takes over JAX's devices.
"""

import os
import sys

# MaxText's converter cannot write from a single device. Read when JAX starts, so before the imports below.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import transformers
from cases import CASES
from maxtext.checkpoint_conversion import to_maxtext
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS


def main(name: str, scan_layers: str, hf_model_path: str, base_output_directory: str) -> None:
    """Converts the source of one case."""
    case = next(case for case in CASES if case.name == name)
    # The converter knows the model by name only, and takes its sizes from this table.
    HF_MODEL_CONFIGS[case.model_name] = transformers.AutoConfig.from_pretrained(hf_model_path)
    to_maxtext.main(
        [
            "",
            *case.maxtext_settings(scan_layers == "True"),
            f"base_output_directory={base_output_directory}",
            f"--hf_model_path={hf_model_path}",
            f"--save_dtype={case.save_dtype}",
            "--simulated_cpu_devices_count=4",
            "hardware=cpu",
            "override_model_config=true",
            "skip_jax_distributed_system=true",
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
