"""The table of families: as the command prints it, and as the README and the tests of MaxText have it."""

import json
from pathlib import Path
from typing import Any

import tiny_models

from slicecast.configs import families, maxtext
from slicecast.convert import describe

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_what_the_command_prints(slicecast: Any) -> None:
    printed = slicecast.run("families").stdout
    assert printed.strip() == describe.families_as_table(maxtext.VERSION)
    assert printed.strip() in (ROOT / "README.md").read_text()


def test_every_model_of_maxtext_belongs_to_one_family(slicecast: Any) -> None:
    records = json.loads(slicecast.run("families", "--json").stdout)
    models = [model for record in records for model in record["models"]]
    assert sorted(models) == maxtext.model_names()
    architectures = [name for record in records for name in record["architectures"]]
    assert sorted(architectures) == families.supported_architectures()
    assert len(set(architectures)) == len(architectures)


def test_unknown_releases_are_refused_with_the_list(slicecast: Any, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", "llama")
    for words in (("families",), ("plan", f"--hf_model_path={source}")):
        done = slicecast.run(*words, "--maxtext_version=0.1", check=False)
        assert done.returncode != 0
        assert f"only of {', '.join(maxtext.versions())}" in done.stderr
    slicecast.run("plan", f"--hf_model_path={source}", f"--maxtext_version={maxtext.VERSION}")
