"""Keeps the MaxText tests out of the normal run, and refuses to run them outside their environment."""

import os
import sys
from pathlib import Path

import pytest

SOURCES_VARIABLE = "SLICECAST_MAXTEXT_SOURCES"

# How MaxText is told about a checkpoint stands in scripts/maxtext_logits.py.
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Fails if this folder was asked for by name (only then is this called) without its environment."""
    if SOURCES_VARIABLE not in os.environ:
        raise pytest.UsageError("the MaxText tests need MaxText and converted checkpoints: run scripts/test_maxtext.sh")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves this folder out of a run of all tests."""
    return None if SOURCES_VARIABLE in os.environ else True


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder with the source checkpoints, the expected logits, and the converted checkpoints."""
    return Path(os.environ[SOURCES_VARIABLE])
