"""The fault campaign in short: the script runs, finds nothing wrong, and would see if something were."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def campaign(*flags: object, timeout: float = 300.0) -> tuple[int, dict[str, Any]]:
    """The exit code of a campaign, and its results."""
    command = [sys.executable, str(SCRIPTS / "fault_campaign.py"), "--json", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.stdout, done.stderr[-5000:]
    return done.returncode, json.loads(done.stdout)


PHASES = ("start", "plan", "read", "write", "merge", "commit", "summary")

# A run that goes on with the work of an earlier one writes wrong values.
WRONG_WHEN_RESUMED = """
import dataclasses
from slicecast.convert.chunk_store import ChunkWriter
right = ChunkWriter.write
def write(self, blocks):
    if self.finished:
        blocks = [dataclasses.replace(block, values=-block.values) for block in blocks]
    return right(self, blocks)
ChunkWriter.write = write
"""


def test_short_campaign() -> None:
    exit_code, results = campaign("--seed", 0, "--rounds", 3)
    assert results["failed"] == []
    assert exit_code == 0
    assert results["rounds"] == 3
    assert results["wrong values"] == 0
    assert results["starts"] > 3
    assert results["faults"] >= 3


def test_wrong_values_are_found(tmp_path: Path) -> None:
    (tmp_path / "prelude.py").write_text(WRONG_WHEN_RESUMED)
    exit_code, results = campaign("--seed", 20, "--rounds", 1, "--only", "local", "--prelude", tmp_path / "prelude.py")
    assert exit_code == 1
    assert results["failed"]
    assert results["wrong values"] > 0


@pytest.mark.campaign
def test_campaign() -> None:
    exit_code, results = campaign("--seed", 5, "--rounds", 200, timeout=3 * 3600.0)
    assert results["failed"] == []
    assert exit_code == 0
    # Each phase of a conversion is hit.
    assert {key.rpartition(", ")[2] for key in results["struck"]} == set(PHASES)
