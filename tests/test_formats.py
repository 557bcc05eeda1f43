"""The table of formats: as the command prints it, as the README shows it, and as the codecs are."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from slicecast.convert import describe
from slicecast.convert.codecs.formats import FORMATS

README = Path(__file__).parent.parent / "README.md"

RunSlicecast = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_prints_the_table_of_the_readme(run_slicecast: RunSlicecast) -> None:
    printed = run_slicecast("formats").stdout
    assert printed.strip() == describe.formats_as_table()
    assert printed.strip() in README.read_text()


def test_for_scripts(run_slicecast: RunSlicecast) -> None:
    rows = json.loads(run_slicecast("formats", "--json").stdout)
    assert [row["name"] for row in rows] == [one.name for one in FORMATS]
    assert {row["decoder"] for row in rows} == {"Pallas", "XLA", "host"}
    assert all(row["stored"] and row["models"] for row in rows)


def test_it_starts_no_accelerator(run_slicecast: RunSlicecast) -> None:
    done = run_slicecast("formats", prelude="import os\nos.environ['JAX_PLATFORMS'] = 'tpu'\n")
    assert done.stderr == ""


def test_cells_fit_a_table() -> None:
    """No cell breaks its row; names are unique."""
    cells = [cell for one in FORMATS for cell in (one.name, one.stored, one.models)]
    assert not any("|" in cell or "\n" in cell for cell in cells)
    assert len({one.name for one in FORMATS}) == len(FORMATS)
