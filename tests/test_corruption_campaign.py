"""The corruption campaign in short: the script runs, finds no hole, and would see one if there were."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

# `verify` does not look at files without chunks.
BLIND = """
from slicecast.convert.verification import digests
digests.compare_files = lambda step, known: []
"""


def campaign(*flags: object, timeout: float = 300.0) -> tuple[int, dict[str, Any]]:
    """The exit code of a campaign, and its results."""
    command = [sys.executable, str(SCRIPTS / "corruption_campaign.py"), "--json", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.stdout, done.stderr[-5000:]
    return done.returncode, json.loads(done.stdout)


def check(exit_code: int, results: dict[str, Any], formats: int = 4) -> None:
    """That there is no hole, and that damages of all kinds were seen by who should see them."""
    assert results["holes"] == []
    assert exit_code == 0
    rows = results["rows"]
    assert len({row["format"] for row in rows}) == formats
    assert {row["act"] for row in rows} == {"flip", "cut", "remove"}
    assert {"chunks", "array metadata", "_METADATA", "_CHECKPOINT_METADATA", "summary"} <= {row["kind"] for row in rows}
    for row in rows:
        if row["kind"] == "chunks":
            assert row["verify found"] == row["digests found"] == row["times"] > 0
        if row["kind"] == "chunks" and row["act"] == "flip":
            assert row["load wrong" if "zarr 2" in row["format"] else "load found"] > 0


def test_short_campaign() -> None:
    check(*campaign("--seed", 0, "--flips", 1))


def test_holes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "prelude.py").write_text(BLIND)
    exit_code, results = campaign("--only", "ocdbt, zarr3", "--flips", 1, "--prelude", tmp_path / "prelude.py")
    assert exit_code == 1
    assert any("_CHECKPOINT_METADATA" in hole and "found nothing" in hole for hole in results["holes"])


@pytest.mark.campaign
def test_campaign() -> None:
    exit_code, results = campaign("--seed", 1, "--flips", 1000, timeout=4 * 3600.0)
    check(exit_code, results)
    assert results["damages"] > 10_000
