"""Conversions of a tiny model of every architecture, on eight devices, compared with the source by `verify`."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from slicecast.configs import families

SCANNED = [name for name in tiny_models.CONFIGS if not tiny_models.model(name).unscanned_only]


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    found = {config["architectures"][0] for config in tiny_models.CONFIGS.values()}
    assert found == set(families.supported_architectures())


@pytest.mark.parametrize("scan_layers", ["true", "false"])
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_conversion_and_verification(slicecast: Any, tmp_path: Path, name: str, scan_layers: str) -> None:
    source, output = tiny_models.write(tmp_path / "source", name), tmp_path / "output"
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", f"--scan_layers={scan_layers}"]
    if scan_layers == "true" and name not in SCANNED:
        done = slicecast.run("convert", *arguments, check=False)
        assert done.returncode != 0
        assert "Add --scan_layers=false" in done.stderr
        return
    slicecast.run("convert", *arguments, "--simulated_cpu_devices_count=8")
    done = slicecast.run("verify", output, f"--hf_model_path={source}")
    assert "all equal to the source, bit for bit" in done.stdout
