"""SIGTERM and Ctrl-C at any moment: the run ends soon, says so, has the exit code of it, and goes on later."""

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

# Two dozen waves of the tiny Llama, up to four at a time.
FLAGS = ["--scan_layers=false", "--host_memory_gb=0.003"]

ENDED = "slicecast: ended by SIGTERM; run the same command again to go on."

# The process signals itself, at a place that the tests choose; with environment variables, not at all, or when another
# process does so too.
SIGNAL = """
import os, pathlib, signal, time
from slicecast.convert import interruption
def signal_once(number=signal.SIGTERM):
    if signaled or "SPARED" in os.environ:
        return
    signaled.append(number)
    if "TOGETHER" in os.environ:
        directory = pathlib.Path(os.environ["TOGETHER"])
        (directory / str(os.getpid())).touch()
        while len(list(directory.iterdir())) < 2:
            time.sleep(0.01)
    os.kill(os.getpid(), number)
signaled = []
"""

WHILE_PLANNING = """
from slicecast.convert import commands
def planning(*arguments):
    signal_once()
    time.sleep(600)
commands.open_checkpoint = planning
"""

# Where a failure would be reported as one of storage.
IN_THE_BEGINNING = """
from slicecast.convert import orbax_checkpoint
def beginning(*arguments):
    signal_once()
    time.sleep(600)
orbax_checkpoint.finished_checkpoint = beginning
"""

# When three waves are written, and others are in flight, for which the main thread waits. They end when the signal was
# seen.
IN_THE_WAVES = """
import itertools, threading
import orbax.checkpoint as ocp
from slicecast.convert import chunk_store, pipeline
save, stop, write = ocp.AsyncCheckpointer.save, pipeline.Pipeline.stop, chunk_store.ChunkWriter.write
begun, saving, stopped = itertools.count(1), threading.Event(), threading.Event()
def begin(*arguments, **options):
    save(*arguments, **options)
    saving.set()
def stop_and_tell(*arguments):
    stop(*arguments)
    stopped.set()
def signaling(*arguments):
    number = next(begun)
    if number > 3 and "SPARED" not in os.environ:
        assert stopped.wait(60)
    digests = write(*arguments)
    if number == 3:
        assert saving.wait(60)
        signal_once()
    return digests
ocp.AsyncCheckpointer.save = begin
pipeline.Pipeline.stop = stop_and_tell
chunk_store.ChunkWriter.write = signaling
"""

IN_A_HANG = """
interruption.GRACE_SECONDS = 1.0
from slicecast.convert import chunk_store
def hanging(self, blocks):
    signal_once()
    time.sleep(600)
chunk_store.ChunkWriter.write = hanging
"""

# Orbax merges the databases of all processes, in the background.
IN_THE_MERGE = """
from orbax.checkpoint._src.serialization import ocdbt_utils
merge = ocdbt_utils.merge_ocdbt_per_process_files
async def merging(*arguments, **options):
    signal_once()
    await merge(*arguments, **options)
    time.sleep(0.5)
ocdbt_utils.merge_ocdbt_per_process_files = merging
"""

# The commit renames the step.
IN_THE_COMMIT = """
import sys
def hook(event, arguments):
    if event == "os.rename" and os.fspath(arguments[1]).endswith("/output/0"):
        signal_once()
        time.sleep(0.5)
sys.addaudithook(hook)
"""

IN_THE_SUMMARY = """
from slicecast.convert import conversion
summarize = conversion.summarize
def summarizing(*arguments):
    signal_once()
    time.sleep(0.5)
    return summarize(*arguments)
conversion.summarize = summarizing
"""

# Two signals of Ctrl-C while a wave hangs.
TWICE = """
from slicecast.convert import chunk_store
def hanging(self, blocks):
    signal_once(signal.SIGINT)
    if len(signaled) == 1:
        time.sleep(0.5)
        signaled.append(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
chunk_store.ChunkWriter.write = hanging
"""

Command = list[str]


@pytest.fixture
def command(llama: Path, tmp_path: Path) -> Command:
    """A conversion."""
    return ["convert", f"--hf_model_path={llama}", f"--base_output_directory={tmp_path / 'output'}", *FLAGS]


def assert_ended(done: subprocess.CompletedProcess[str], last_line: str = ENDED) -> None:
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == last_line


def assert_goes_on(slicecast: Any, command: Command, output: Path, waves: int = 0) -> None:
    """Checks that nothing can be loaded yet, and that the same command finishes, with what was done before."""
    assert not (output / "0").exists()
    before = data(output)
    done = slicecast.run(*command)
    found = re.search(r"(\d+) waves written, (\d+) had been written before", done.stderr)
    assert found is not None
    assert int(found[2]) >= waves
    assert before.items() <= data(output).items()
    slicecast.run("verify", output, command[1])


def data(output: Path) -> dict[str, tuple[int, int]]:
    """The files that hold chunks, by their paths below the item, with when they were written and their size."""
    files = (path for path in output.glob("0*/items*/ocdbt.process_*/d/*") if not path.name.endswith(".__lock"))
    return {"/".join(path.parts[-3:]): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.parametrize("place", [WHILE_PLANNING, IN_THE_BEGINNING], ids=["planning", "beginning"])
def test_before_anything_is_written(slicecast: Any, command: Command, tmp_path: Path, place: str) -> None:
    start = time.monotonic()
    done = slicecast.run(*command, prelude=SIGNAL + place, check=False)
    assert time.monotonic() - start < 20
    assert_ended(done)
    assert done.stderr == f"{ENDED}\n"
    assert not (tmp_path / "output").exists()


def test_in_the_waves(slicecast: Any, command: Command, tmp_path: Path) -> None:
    """What is in flight is done, and what is done is kept."""
    start = time.monotonic()
    done = slicecast.run(*command, prelude=SIGNAL + IN_THE_WAVES, check=False)
    assert time.monotonic() - start < 20
    assert_ended(done)
    assert list((tmp_path / "output" / "slicecast-log").iterdir())
    assert_goes_on(slicecast, command, tmp_path / "output", waves=3)


def test_what_hangs_is_given_up(slicecast: Any, command: Command, tmp_path: Path) -> None:
    start = time.monotonic()
    done = slicecast.run(*command, prelude=SIGNAL + IN_A_HANG, check=False)
    assert 1 < time.monotonic() - start < 20
    assert_ended(
        done,
        "slicecast: ended by SIGTERM; what was in flight was not done within 1 seconds and is given up; run the same "
        "command again to go on.",
    )
    assert_goes_on(slicecast, command, tmp_path / "output")


@pytest.mark.parametrize("place", [IN_THE_MERGE, IN_THE_COMMIT], ids=["merge", "commit"])
def test_when_all_is_written(slicecast: Any, command: Command, tmp_path: Path, place: str) -> None:
    """What is left takes less time than to start again: it is done."""
    done = slicecast.run(*command, prelude=SIGNAL + place, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("done in ")
    assert (tmp_path / "output" / "slicecast-summary.json").exists()
    slicecast.run("verify", tmp_path / "output", command[1])


def test_in_the_summary(slicecast: Any, command: Command, tmp_path: Path) -> None:
    """The checkpoint is finished; the same command has only the summary to write."""
    summary = tmp_path / "output" / "slicecast-summary.json"
    assert_ended(slicecast.run(*command, prelude=SIGNAL + IN_THE_SUMMARY, check=False))
    assert not summary.exists()
    assert "the checkpoint was finished before" in slicecast.run(*command).stderr
    assert summary.exists()


def test_ctrl_c_twice(slicecast: Any, command: Command, tmp_path: Path) -> None:
    """The second time the process does not wait for what is in flight."""
    start = time.monotonic()
    done = slicecast.run(*command, prelude=SIGNAL + TWICE, check=False)
    assert time.monotonic() - start < 20
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "slicecast: interrupted; run the same command again to go on."
    assert "Traceback" not in done.stderr
    assert_goes_on(slicecast, command, tmp_path / "output")


def test_all_processes(slicecast: Any, command: Command, tmp_path: Path) -> None:
    """As when a whole slice is taken away; fewer hosts may go on."""
    together = tmp_path / "together"
    together.mkdir()
    _, *arguments = command
    environments = {process: {"TOGETHER": str(together)} for process in range(2)}
    first, second = slicecast.run_processes(
        *arguments, environments=environments, prelude=SIGNAL + IN_THE_WAVES, check=False
    )
    assert_ended(first)
    if second.returncode != -signal.SIGABRT:  # What JAX does when the first process, which it needs, has ended.
        assert_ended(second)
    assert_goes_on(slicecast, command, tmp_path / "output", waves=5)


@pytest.mark.parametrize("ended", [0, 1])
def test_one_of_two_processes(slicecast: Any, command: Command, tmp_path: Path, ended: int) -> None:
    """The other one ends too, by itself, and with a code for which XPK starts it again."""
    _, *arguments = command
    prelude = SIGNAL + IN_THE_WAVES + "from slicecast.convert import hosts\nhosts._HEARTBEAT_SECONDS = 5\n"
    done = slicecast.run_processes(
        *arguments, prelude=prelude, environments={1 - ended: {"SPARED": "1"}}, check=False, timeout=60
    )
    assert_ended(done[ended])
    code = done[1 - ended].returncode
    assert code == 42 or code < 0 or 127 <= code <= 255
    assert_goes_on(slicecast, command, tmp_path / "output")
