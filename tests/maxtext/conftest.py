"""Keeps the MaxText tests out of the normal run, and refuses to run them outside their environment."""

import os
from pathlib import Path

import pytest

SOURCES_VARIABLE = "SLICECAST_MAXTEXT_SOURCES"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores this folder in a run of all tests; fails if it was asked for by name without its environment."""
    if SOURCES_VARIABLE in os.environ:
        return None
    here = Path(__file__).parent
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    if any(path.is_relative_to(here) for path in named):
        raise pytest.UsageError("the MaxText tests need MaxText and converted checkpoints: run scripts/test_maxtext.sh")
    return True


@pytest.fixture(scope="session")
def sources() -> Path:
    """The folder with the source checkpoints, the expected logits, and the converted checkpoints."""
    return Path(os.environ[SOURCES_VARIABLE])
