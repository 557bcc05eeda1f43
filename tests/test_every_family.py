"""Conversions of a tiny model of every architecture, on eight devices, compared with the source by `verify`."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from slicecast.configs import families


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    found = {config["architectures"][0] for config in tiny_models.CONFIGS.values()}
    assert found == set(families.supported_architectures())


# The other layout is compared in `test_round_trip.py`.
FIRST_LAYOUTS = list({name: (name, scan_layers) for name, scan_layers in reversed(tiny_models.TREES)}.values())


@pytest.mark.parametrize(("name", "scan_layers"), FIRST_LAYOUTS)
def test_conversion_and_verification(slicecast: Any, tmp_path: Path, name: str, scan_layers: bool) -> None:
    source, output = tiny_models.write(tmp_path / "source", name), tmp_path / "output"
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", f"--scan_layers={scan_layers}"]
    slicecast.run("convert", *arguments, "--simulated_cpu_devices_count=8")
    done = slicecast.run("verify", output, f"--hf_model_path={source}")
    assert "all equal to the source, bit for bit" in done.stdout


@pytest.mark.parametrize("name", [name for name in tiny_models.CONFIGS if (name, True) not in tiny_models.TREES])
def test_models_that_maxtext_does_not_scan(slicecast: Any, tmp_path: Path, name: str) -> None:
    source = tiny_models.write(tmp_path / "source", name)
    done = slicecast.run("plan", f"--hf_model_path={source}", check=False)
    assert done.returncode != 0
    assert "Add --scan_layers=false" in done.stderr
