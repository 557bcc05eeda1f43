"""Keeps the oracles out of the normal run, and refuses to run them outside their environment."""

import os
import zlib
from pathlib import Path

import pytest

SEED_VARIABLE = "SLICECAST_ORACLE_SEED"


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Fails if this folder was asked for by name (only then is this called) without its environment."""
    if SEED_VARIABLE not in os.environ:
        raise pytest.UsageError("the oracles need the formats' own libraries: run scripts/test_oracles.sh")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves this folder out of a run of all tests."""
    return None if SEED_VARIABLE in os.environ else True


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of this test in this run; the order of tests does not matter."""
    return zlib.crc32(f"{os.environ[SEED_VARIABLE]} {request.node.nodeid}".encode())
