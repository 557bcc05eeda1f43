"""What processes tell each other before the first write: what they are about to do, and what the first one found."""

import json
from pathlib import Path
from typing import Any

import pytest

FACTS = ["version of slicecast", "source", "plan", "format"]

TEXT = "/output/0: é 木 " * 500

# In place of a conversion, each process calls what it would call, and prints what came of it.
PROGRAM = """
import json, sys
import jax
from slicecast.convert import cli, hosts
from slicecast.convert.errors import OutputError, SlicecastError, StorageError
arguments = cli.parse(sys.argv[1:])
hosts.initialize(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
process = jax.process_index()
called = []
def result(function, *arguments):
    try:
        return function(*arguments)
    except SlicecastError as error:
        return [type(error).__name__, str(error)]
def value(text):
    called.append(text)
    return text
def fail(kind, text):
    called.append(text)
    raise kind(text)
facts = dict.fromkeys({facts!r}, "the same")
print(json.dumps({{
    "value": result(hosts.on_first, lambda: value({text!r})),
    "nothing": result(hosts.on_first, lambda: value("")),
    "refused": result(hosts.on_first, lambda: fail(OutputError, {text!r})),
    "storage": result(hosts.on_first, lambda: fail(StorageError, "a bucket")),
    "agreement": result(hosts.check_agreement, facts),
    "differences": {{
        name: result(hosts.check_agreement, {{**facts, name: f"that of {{process}}"}}) for name in facts
    }},
    "called": called,
}}))
hosts.end_alone(0)
"""


@pytest.fixture(scope="module")
def results(module_slicecast: Any) -> list[dict[str, Any]]:
    """What came of it in each of two processes."""
    program = PROGRAM.format(facts=FACTS, text=TEXT)
    arguments = ["--hf_model_path=unused", "--base_output_directory=unused"]
    done = module_slicecast.run_processes(*arguments, prelude=program)
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]  # Gloo has greeted before.


def test_what_the_first_process_finds(results: list[dict[str, Any]]) -> None:
    """All get it: it is the first one that looks and writes."""
    for found in results:
        assert found["value"] == TEXT
        assert found["nothing"] == ""
    assert [found["called"] for found in results] == [[TEXT, "", TEXT, "a bucket"], []]


def test_what_the_first_process_cannot_do(results: list[dict[str, Any]]) -> None:
    """All end with the same error, and with its exit code."""
    for found in results:
        assert found["refused"] == ["OutputError", TEXT]
        assert found["storage"] == ["StorageError", "a bucket"]


@pytest.mark.parametrize("name", FACTS)
def test_what_differs_is_named(results: list[dict[str, Any]], name: str) -> None:
    for process, found in enumerate(results):
        assert found["agreement"] is None
        kind, message = found["differences"][name]
        assert kind == "UsageError"
        assert message.startswith(f"processes [1] have another {name} than process 0 (here it is that of {process}). ")


@pytest.mark.parametrize(
    ("flag", "named"), [("--checkpoint_storage_use_zarr3=false", "format"), ("--scan_layers=false", "plan")]
)
def test_processes_with_other_flags(slicecast: Any, llama: Path, tmp_path: Path, flag: str, named: str) -> None:
    """None of them writes anything."""
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={llama}", f"--base_output_directory={output}"]
    for done in slicecast.run_processes(*arguments, extra={1: [flag]}, check=False):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"slicecast: UsageError: processes [1] have another {named} ")
    assert not output.exists()


def test_processes_of_other_versions(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """As where one host has an older container."""
    output = tmp_path / "output"
    prelude = """
import os
from slicecast.convert import conversion
versions = conversion.versions
conversion.versions = lambda: {**versions(), "slicecast": os.environ.get("VERSION", "1.0")}
"""
    arguments = [f"--hf_model_path={llama}", f"--base_output_directory={output}"]
    for done in slicecast.run_processes(*arguments, prelude=prelude, environments={1: {"VERSION": "0.9"}}, check=False):
        assert done.returncode == 2
        assert "processes [1] have another version of slicecast than process 0" in done.stderr.splitlines()[-1]
    assert not output.exists()
