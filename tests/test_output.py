"""Whose an output is: one plan and one run at a time write there, and only `--overwrite` removes what is there."""

import json
import os
import platform
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from slicecast.convert import orbax_checkpoint, output
from slicecast.convert.errors import OutputError, UsageError

PLAN = "a" * 64
OTHER = "b" * 64

UNFINISHED = "0.orbax-checkpoint-tmp"

# Seven waves of the tiny Llama, which each take a moment longer, so that there is time for another run.
BUDGET = "--host_memory_gb=0.01"
SLOW = """
import time
from slicecast.convert import output, pipeline
output._SECONDS_BETWEEN_LOOKS = 0.0
class Slow(pipeline.Reader):
    def read(self, wanted):
        time.sleep(0.1)
        return super().read(wanted)
pipeline.Reader = Slow
"""

# The reads wait for a file.
WAITING = """
import os, time
from slicecast.convert import pipeline
class Waiting(pipeline.Reader):
    def read(self, wanted):
        while not os.path.exists({file!r}):
            time.sleep(0.01)
        return super().read(wanted)
pipeline.Reader = Waiting
"""

# Kills the process once it has written two waves.
KILL = """
import itertools, os, signal
from slicecast.convert import chunk_store
write, written = chunk_store.ChunkWriter.write, itertools.count(1)
def killing(self, blocks):
    digests = write(self, blocks)
    if next(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return digests
chunk_store.ChunkWriter.write = killing
"""

# Another run takes the output over right before the commit, when all is written.
TAKEN_BEFORE_COMMIT = """
from slicecast.convert import orbax_checkpoint, output
save = orbax_checkpoint.save
def taken(directory, *arguments, plan, before_commit, **options):
    def before():
        output.begin(directory, plan, overwrite=False, ocdbt=True)
        before_commit()
    save(directory, *arguments, plan=plan, before_commit=before, **options)
orbax_checkpoint.save = taken
"""


def begin(directory: Path, digest: str = PLAN, *, overwrite: bool = False, ocdbt: bool = True) -> str:
    return output.begin(epath.Path(directory), digest, overwrite=overwrite, ocdbt=ocdbt)


def check(directory: Path, name: str) -> None:
    output.Ownership(epath.Path(directory), name).check_now()


def run_file(directory: Path) -> dict[str, Any]:
    """What the output says of the run that has it."""
    record: dict[str, Any] = json.loads((directory / "slicecast-run").read_text())
    return record


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def finish(directory: Path, digest: str) -> None:
    """Makes what looks like a finished checkpoint with its log and summary."""
    for file, text in {
        "0/_CHECKPOINT_METADATA": json.dumps({"custom_metadata": {"slicecast": {"digest": digest}}}),
        "0/items/manifest.ocdbt": "",
        "slicecast-log/0123-0-0.jsonl": "",
        "slicecast-summary.json": "{}",
    }.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(text)


def leave_unfinished(directory: Path, digest: str) -> None:
    """Makes what looks like the unfinished checkpoint of a killed run."""
    database = directory / UNFINISHED / "items.orbax-checkpoint-tmp" / f"ocdbt.process_0x{digest[:12]}01234567"
    database.mkdir(parents=True)
    (database / "manifest.ocdbt").write_text("")


def test_places() -> None:
    assert str(output.open_output("some/where")) == os.path.abspath("some/where")
    assert str(output.open_output("gs://bucket/some/where/")) == "gs://bucket/some/where"
    with pytest.raises(UsageError, match="s3://bucket/x: 's3://' cannot be written"):
        output.open_output("s3://bucket/x")


def test_a_bucket_without_the_package_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"gs://bucket/x: gcsfs is not installed. Run `pip install 'slice"):
        output.open_output("gs://bucket/x")


def test_a_new_output(tmp_path: Path) -> None:
    before = time.time()
    name = begin(tmp_path / "not" / "there")
    record = run_file(tmp_path / "not" / "there")
    assert before <= record.pop("started") <= time.time()
    assert record == {"digest": PLAN, "name": name, "host": platform.node()}
    check(tmp_path / "not" / "there", name)


def test_another_plan_is_refused(tmp_path: Path) -> None:
    name = begin(tmp_path)
    before = content(tmp_path)
    with pytest.raises(OutputError) as caught:
        begin(tmp_path, OTHER)
    for part in (str(tmp_path), f"begun as {PLAN[:12]}", f"this is {OTHER[:12]}", "Run the command", "--overwrite"):
        assert part in str(caught.value)
    assert content(tmp_path) == before
    check(tmp_path, name)


def test_the_same_plan_takes_over(tmp_path: Path) -> None:
    first, second = begin(tmp_path), begin(tmp_path)
    assert first != second
    check(tmp_path, second)
    when = time.strftime("%H:%M:%S", time.localtime(run_file(tmp_path)["started"]))
    with pytest.raises(OutputError, match=f"begun on {platform.node()} at {when}, has taken this output over"):
        check(tmp_path, first)


def test_a_finished_output_is_nobodys(tmp_path: Path) -> None:
    name = begin(tmp_path)
    output.release(epath.Path(tmp_path))
    assert content(tmp_path) == {}
    with pytest.raises(OutputError, match="another run has finished or removed this checkpoint"):
        check(tmp_path, name)


def test_looks_are_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ownership = output.Ownership(epath.Path(tmp_path), begin(tmp_path))
    begin(tmp_path)
    ownership.check()
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LOOKS", 0.0)
    with pytest.raises(OutputError, match="has taken this output over"):
        ownership.check()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_finished_checkpoint_of_this_plan(tmp_path: Path, overwrite: bool) -> None:
    finish(tmp_path, PLAN)
    before = content(tmp_path)
    assert begin(tmp_path, overwrite=overwrite) == ""
    assert content(tmp_path) == before


@pytest.mark.parametrize("ocdbt", [True, False])
def test_the_finished_checkpoint_of_another_plan(tmp_path: Path, ocdbt: bool) -> None:
    finish(tmp_path, OTHER)
    (tmp_path / "notes.txt").write_text("ours")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"there is a finished checkpoint of another source.*--overwrite"):
        begin(tmp_path, ocdbt=ocdbt)
    assert content(tmp_path) == before
    name = begin(tmp_path, overwrite=True, ocdbt=ocdbt)
    check(tmp_path, name)
    assert content(tmp_path).keys() == {"notes.txt", "slicecast-run"}
    assert not (tmp_path / "0").exists()


def test_the_unfinished_checkpoint_of_another_plan(tmp_path: Path) -> None:
    other = begin(tmp_path, OTHER)
    leave_unfinished(tmp_path, OTHER)
    name = begin(tmp_path, overwrite=True)
    check(tmp_path, name)
    assert content(tmp_path).keys() == {"slicecast-run"}
    with pytest.raises(OutputError, match="has taken this output over"):
        check(tmp_path, other)


def test_overwriting_goes_on_with_the_same_plan(tmp_path: Path) -> None:
    """A run that is started again by its scheduler, with the same command, keeps what it has done."""
    begin(tmp_path, overwrite=True)
    leave_unfinished(tmp_path, PLAN)
    before = content(tmp_path)
    begin(tmp_path, overwrite=True)
    assert content(tmp_path).keys() == before.keys()


def test_overwriting_removes_what_another_plan_wrote_late(tmp_path: Path) -> None:
    """Such an output cannot be committed, and this is the way out of it."""
    begin(tmp_path)
    leave_unfinished(tmp_path, PLAN)
    leave_unfinished(tmp_path, OTHER)
    begin(tmp_path, overwrite=True)
    assert content(tmp_path).keys() == {"slicecast-run"}


@pytest.mark.parametrize("leave", [finish, leave_unfinished])
def test_killed_while_overwriting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Callable[[Path, str], None]
) -> None:
    """What is half removed is neither loaded nor continued; only the flag helps."""
    leave(tmp_path, OTHER)
    with monkeypatch.context() as patched:
        patched.setattr(orbax_checkpoint, "remove", lambda _: (tmp_path / "nowhere").rmdir())
        with pytest.raises(OutputError, match=r"cannot be written \(No such file or directory\)"):
            begin(tmp_path, overwrite=True)
    assert run_file(tmp_path)["digest"] == ""
    shutil.rmtree(tmp_path / "0", ignore_errors=True)
    for digest in (PLAN, OTHER):
        with pytest.raises(OutputError, match="--overwrite"):
            begin(tmp_path, digest)
    check(tmp_path, begin(tmp_path, overwrite=True))
    assert not (tmp_path / UNFINISHED).exists()


def test_files_of_another_plan_are_not_overwritten(tmp_path: Path) -> None:
    """A file does not say which plan it is of, and the other run may still write some."""
    begin(tmp_path, OTHER)
    before = content(tmp_path)
    with pytest.raises(OutputError, match=f"another plan began here on {platform.node()}. Without OCDBT"):
        begin(tmp_path, overwrite=True, ocdbt=False)
    assert content(tmp_path) == before
    begin(tmp_path, OTHER, overwrite=True, ocdbt=False)


def test_an_unfinished_checkpoint_of_somebody_else(tmp_path: Path) -> None:
    leave_unfinished(tmp_path, PLAN)
    before = content(tmp_path)
    with pytest.raises(OutputError, match="an unfinished checkpoint that slicecast did not begin"):
        begin(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "null", "{}", '{"digest": "' + PLAN + '"}', '{"digest": 1, "name": 2}', "\x00\xff"]
)
def test_a_damaged_run_file(tmp_path: Path, damaged: str) -> None:
    """It may have been anybody's."""
    (tmp_path / "slicecast-run").write_bytes(damaged.encode("latin-1"))
    leave_unfinished(tmp_path, PLAN)
    before = content(tmp_path)
    with pytest.raises(OutputError, match="--overwrite"):
        begin(tmp_path)
    assert content(tmp_path) == before
    check(tmp_path, begin(tmp_path, overwrite=True))
    assert content(tmp_path).keys() == {"slicecast-run"}


def at_once(*functions: Callable[[], str]) -> list[str | OutputError]:
    """What functions return or raise that are called at the same time."""
    barrier = threading.Barrier(len(functions))
    results: list[str | OutputError | None] = [None] * len(functions)

    def call(i: int) -> None:
        barrier.wait()
        try:
            results[i] = functions[i]()
        except OutputError as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return [result for result in results if result is not None]


def names(results: Sequence[str | OutputError]) -> list[str]:
    return [result for result in results if isinstance(result, str)]


@pytest.mark.parametrize("repetition", range(50))
def test_two_plans_at_once(tmp_path: Path, repetition: int) -> None:
    results = at_once(lambda: begin(tmp_path, PLAN), lambda: begin(tmp_path, OTHER))
    (winner,) = names(results)
    (loser,) = (result for result in results if isinstance(result, OutputError))
    assert "an unfinished checkpoint of another source" in str(loser)
    check(tmp_path, winner)
    assert run_file(tmp_path)["digest"] == (PLAN, OTHER)[results.index(winner)]


@pytest.mark.parametrize("repetition", range(50))
def test_two_runs_of_a_plan_at_once(tmp_path: Path, repetition: int) -> None:
    results = at_once(lambda: begin(tmp_path), lambda: begin(tmp_path))
    assert len(names(results)) == len(set(results)) == 2
    (loser,) = (name for name in names(results) if name != run_file(tmp_path)["name"])
    with pytest.raises(OutputError, match="has taken this output over"):
        check(tmp_path, loser)


@pytest.mark.parametrize("repetition", range(20))
def test_two_plans_overwrite_at_once(tmp_path: Path, repetition: int) -> None:
    """The one that comes last has the output, and the other one, if it was not refused, is told."""
    finish(tmp_path, "c" * 64)
    results = at_once(lambda: begin(tmp_path, PLAN, overwrite=True), lambda: begin(tmp_path, OTHER, overwrite=True))
    owner = run_file(tmp_path)["name"]
    assert owner in names(results), results
    assert not (tmp_path / "0").exists()


def test_a_place_where_nothing_can_be_written(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "output"
    with pytest.raises(OutputError, match=rf"{place}: cannot be written \(Not a directory\)"):
        begin(place)
    done = slicecast.run("convert", f"--hf_model_path={llama}", f"--base_output_directory={place}", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"slicecast: OutputError: {place}: ")


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_at_once(slicecast: Any, llama: Path, tmp_path: Path, seed: int) -> None:
    """One of them finishes; the other one says why it stops, or finds the checkpoint finished."""
    directory = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={llama}", f"--base_output_directory={directory}", BUDGET]
    first = slicecast.start(*arguments, prelude=SLOW)
    time.sleep(random.Random(seed).uniform(0, 2))
    done = [run.wait() for run in (slicecast.start(*arguments, prelude=SLOW), first)]
    # 42 where the other one has renamed what this one was writing to, before this one looked.
    assert sorted(one.returncode for one in done) in ([0, 0], [0, 1], [0, 42]), [one.stderr for one in done]
    for one in done:
        last = one.stderr.splitlines()[-1]
        assert "Traceback" not in one.stderr
        error = {1: f"slicecast: OutputError: {directory}", 42: f"slicecast: StorageError: {directory}"}
        assert last.startswith(error.get(one.returncode, "done in "))
    slicecast.run("verify", directory, f"--hf_model_path={llama}")


def test_taken_over_before_the_commit(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """A run that has lost its output does not commit; the one that has it does."""
    directory = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={llama}", f"--base_output_directory={directory}", BUDGET]
    done = slicecast.run(*arguments, prelude=TAKEN_BEFORE_COMMIT, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "has taken this output over" in done.stderr.splitlines()[-1]
    assert not (directory / "0").exists()
    done = slicecast.run(*arguments)
    assert ": 0 waves written, " in done.stderr
    slicecast.run("verify", directory, f"--hf_model_path={llama}")


def test_another_plan_while_a_run_works(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={llama}", f"--base_output_directory={directory}", BUDGET]
    first = slicecast.start(*arguments, prelude=WAITING.format(file=str(tmp_path / "go")))
    while not (directory / "slicecast-run").exists():
        assert first.running
        time.sleep(0.01)
    done = slicecast.run(*arguments, "--save_dtype=float32", check=False)
    assert first.running
    (tmp_path / "go").touch()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "an unfinished checkpoint of another source" in done.stderr.splitlines()[-1]
    assert first.wait().returncode == 0
    slicecast.run("verify", directory, f"--hf_model_path={llama}")


def test_databases_of_another_plan(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """As a run would leave that was thought dead: they are not taken over, and nothing is committed with them."""
    directory = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={llama}", f"--base_output_directory={directory}", BUDGET]
    assert slicecast.run(*arguments, prelude=KILL, check=False).returncode < 0
    databases = list(directory.glob("0.*/items*/ocdbt.process_*"))
    assert databases
    for database in databases:
        database.rename(database.with_name(f"ocdbt.process_0x{OTHER[:12]}{database.name[-8:]}"))
    done = slicecast.run(*arguments, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"ocdbt.process_0x{OTHER[:12]}" in done.stderr.splitlines()[-1]
    assert ", 0 had been written before" not in done.stderr
    assert not (directory / "0").exists()
    done = slicecast.run(*arguments, "--overwrite")
    assert "7 waves written, 0 had been written before" in done.stderr
    slicecast.run("verify", directory, f"--hf_model_path={llama}")


def test_overwriting_a_finished_checkpoint(slicecast: Any, kimi: Path, llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "output"
    slicecast.run("convert", f"--hf_model_path={llama}", f"--base_output_directory={directory}")
    before = content(directory)
    arguments = ["convert", f"--hf_model_path={kimi}", f"--base_output_directory={directory}"]
    done = slicecast.run(*arguments, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"slicecast: OutputError: {directory}/0: there is a finished")
    assert content(directory) == before
    slicecast.run(*arguments, "--overwrite")
    slicecast.run("verify", directory, f"--hf_model_path={kimi}")
    data = {name for name in before if "/d/" in name}
    assert data
    assert data.isdisjoint(content(directory))
    parts = {part.name for part in (directory / "slicecast-log").iterdir()}
    assert parts
    assert parts.isdisjoint(Path(name).name for name in before)
    summary = json.loads((directory / "slicecast-summary.json").read_text())
    assert summary["source"] == str(kimi)
    assert len(summary["runs"]) == 1
