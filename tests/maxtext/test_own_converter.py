"""A converted checkpoint has the bits that MaxText's own converter writes, for the models that it can convert."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from cases import CASES

pytestmark = pytest.mark.maxtext


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [
        ("llama31", True),
        ("llama31", False),
        ("deepseek2", False),  # 0.2.5 fails on it with scanned layers
        ("gpt_oss", True),
        ("gpt_oss", False),
    ],
)
def test_bits_equal_maxtexts_own_conversion(name: str, scan_layers: bool, sources: Path, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    program = Path(__file__).with_name("convert_with_maxtext.py")
    arguments = [case.name, str(scan_layers), str(sources / name / "hf"), str(tmp_path)]
    run = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"MaxText's converter failed:\n{run.stderr[-2000:]}"

    ours = oracle.read_disk(sources / name / ("scanned" if scan_layers else "unscanned") / "0" / "items")
    theirs = oracle.read_disk(tmp_path / "0" / "items")
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == array.dtype, path
        np.testing.assert_array_equal(ours[path], array, err_msg=path)
