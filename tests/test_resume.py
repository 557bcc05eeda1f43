"""A run that was killed, or failed, goes on when it is started again; until it is done there is nothing to load."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from slicecast.convert import orbax_checkpoint

UNFINISHED = "0.orbax-checkpoint-tmp"

# Each read takes a moment longer, so that there is time to kill.
SLOW = """
import time
from slicecast.convert import pipeline
class Slow(pipeline.Reader):
    def read(self, wanted):
        time.sleep(0.01)
        return super().read(wanted)
pipeline.Reader = Slow
"""

# Kills the process right before its n-th change of a directory or file below the output that Python sees: those of
# Orbax. A file that is opened for writing counts twice: before, and when it is there but empty.
KILL_AT = """
import os, signal, sys
state = [0, False]
def hook(event, arguments):
    if state[1] or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    path = arguments[0]
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith({output!r}):
        return
    state[1] = True
    for empty in (False, True) if event == "open" else (False,):
        state[0] += 1
        if state[0] == {number}:
            if empty:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
            os.kill(os.getpid(), signal.SIGKILL)
    state[1] = False
sys.addaudithook(hook)
"""

# Kills the process right before the step is renamed: everything is done but that.
KILL_BEFORE_COMMIT = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and os.fspath(arguments[1]) == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""

# Leaves one chunk out.
FORGET = """
from slicecast.convert import chunk_store
missing = chunk_store.ChunkWriter.missing
chunk_store.ChunkWriter.missing = lambda self, array, box: [
    chunk for chunk in missing(self, array, box) if self.format.key(array, chunk) != {key!r}
]
"""

# The disk takes no files over 300 kB.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
"""

# A source file shrinks once the run has begun to read.
SHRINK = """
import os
from slicecast.convert import pipeline
class Shrinking(pipeline.Reader):
    def read(self, wanted):
        if self.requests > 10:
            os.truncate({file!r}, 5000)
        return super().read(wanted)
pipeline.Reader = Shrinking
"""


# A checkpoint that takes hundreds of waves of a small budget, although it has few bytes.
SIZES = {"layers": 6, "experts": 32, "hidden": 128, "moe_intermediate": 128}
SMALL_BUDGET = "--host_memory_gb=0.002"
UNSCANNED = "--scan_layers=false"

# The same for the tiny Kimi-K2.6, a dozen waves.
BUDGET = "--host_memory_gb=0.01"


@pytest.fixture(scope="session")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with `SIZES`. Not to be changed."""
    return make_checkpoint(**SIZES)


def databases(output: Path) -> dict[str, frozenset[str]]:
    """The keys of the chunks in each process's database, by the database's name."""
    found = {}
    for directory in output.glob("0*/items*/ocdbt.process_*"):
        keys: list[bytes] = []
        if (directory / "manifest.ocdbt").exists():
            keys = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result().list().result()
        found[directory.name] = frozenset(key.decode() for key in keys if b"/c/" in key)
    return found


def chunks(output: Path) -> frozenset[str]:
    """The keys of all chunks that are finished."""
    return frozenset().union(*databases(output).values())


def data_files(output: Path) -> dict[str, bytes]:
    """The contents of the files that hold chunks, by their paths below the item."""
    paths = output.glob("0*/items*/ocdbt.process_*/d/*")
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in paths if not path.name.endswith(".__lock")}


def until(condition: Callable[[], bool], timeout: float = 60.0) -> bool:
    """Waits for a condition; False if it does not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def kill_while_writing(runs: Sequence[Any], output: Path, victims: Collection[int], files: int) -> None:
    """Kills some processes once there are `files` more files, and the others soon after."""

    def count() -> int:
        return sum(1 for _ in output.glob("0*/items*/ocdbt.process_*/d/*"))

    before = count()
    assert until(lambda: count() >= before + files or not all(run.running for run in runs))
    for victim in victims:
        runs[victim].kill()
    after = count()
    survivors = [run for i, run in enumerate(runs) if i not in victims]
    if survivors:
        until(lambda: count() > after, timeout=0.5)
    for run in survivors:
        run.kill()


def assert_not_loadable(output: Path) -> None:
    """Checks that no reader finds a checkpoint, and that looking for one destroys nothing."""
    assert not (output / "0").exists()
    if not output.exists():
        return
    before = sorted(output.rglob("*"))
    with ocp.CheckpointManager(output) as manager:
        assert manager.latest_step() is None
        assert manager.all_steps() == []
    with pytest.raises(FileNotFoundError):
        ocp.StandardCheckpointer().restore(output / "0" / "items")
    assert sorted(output.rglob("*")) == before


class Campaign:
    """A conversion that is interrupted again and again; checks that nothing is lost and nothing is done twice."""

    def __init__(self, slicecast: Any, source: Path, output: Path):
        self._slicecast = slicecast
        self._arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", UNSCANNED]
        self._verify = ["verify", output, f"--hf_model_path={source}"]
        self._output = output
        self._finished: frozenset[str] = frozenset()
        self._databases: dict[str, frozenset[str]] = {}
        self._files: dict[str, bytes] = {}

    def interrupted(self, processes: int, victims: Collection[int], files: int, budget: str = SMALL_BUDGET) -> None:
        """Starts the conversion, and kills it when it has written `files` files."""
        runs = self._slicecast.start_processes(*self._arguments, budget, processes=processes, prelude=SLOW)
        kill_while_writing(runs, self._output, victims, files)
        assert not any(run.process.returncode == 0 for run in runs), "finished before it could be killed"
        assert_not_loadable(self._output)
        self._check()

    def killed_at(self, number: int) -> bool:
        """Runs the conversion, and kills it at its n-th change of a file or directory; False once it has committed."""
        prelude = KILL_AT.format(output=str(self._output), number=number)
        done = self._slicecast.run("convert", *self._arguments, SMALL_BUDGET, prelude=prelude, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        self._check()
        if (self._output / "0").exists():
            return False
        assert done.returncode
        assert_not_loadable(self._output)
        return True

    def completed(self, processes: int = 1, budget: str = SMALL_BUDGET) -> None:
        """Runs the conversion to its end."""
        if processes == 1:
            self._slicecast.run("convert", *self._arguments, budget)
        else:
            self._slicecast.run_processes(*self._arguments, budget, processes=processes)
        self._check()

    def verified(self) -> None:
        """Compares the finished checkpoint with its source."""
        self._slicecast.run(*self._verify)

    def _check(self) -> None:
        """Checks that what was finished before is still there, and was not written again."""
        now = databases(self._output)
        for name, keys in self._databases.items():
            assert now[name] == keys
        for name in now.keys() - self._databases.keys():
            assert not now[name] & self._finished, "written again"
        files = data_files(self._output)
        for name, content in self._files.items():
            assert files[name] == content
        self._databases, self._finished = now, frozenset().union(*now.values())
        # Of the files, only those that a database refers to are promised to stay; here that is all of them.
        self._files = files


@pytest.fixture
def campaign(slicecast: Any, source: Path, tmp_path: Path) -> Campaign:
    return Campaign(slicecast, source, tmp_path / "output")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(campaign: Campaign, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        campaign.interrupted(processes=1, victims=[0], files=rng.randrange(1, 60))
    campaign.completed()
    campaign.verified()


def test_processes_killed_and_replaced(campaign: Campaign) -> None:
    """Any process may be killed; the run goes on with as many processes and as much memory as there are then."""
    rng = random.Random(2)
    campaign.interrupted(processes=2, victims=[1], files=rng.randrange(4, 50))
    campaign.interrupted(processes=2, victims=[0], files=rng.randrange(4, 50))
    campaign.interrupted(processes=1, victims=[0], files=rng.randrange(2, 15), budget="--host_memory_gb=0.005")
    campaign.interrupted(processes=2, victims=[0, 1], files=rng.randrange(4, 50))
    campaign.completed(processes=2, budget="--host_memory_gb=0.003")
    campaign.verified()


def test_killed_at_each_step_of_orbax(campaign: Campaign) -> None:
    """Before each step of the beginning and of the commit, one after another: made, merged, renamed."""
    number = 1
    while campaign.killed_at(number):
        number += 1
    # The directories of output, step and item; three files that are written; two commit markers; two renames.
    assert number > 15
    campaign.verified()


def test_nothing_is_read_if_only_the_commit_is_left(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={kimi}", f"--base_output_directory={output}", BUDGET]
    prelude = KILL_BEFORE_COMMIT.format(step=str(output / "0"))
    done = slicecast.run(*arguments, prelude=prelude, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (output / UNFINISHED / "commit_success.txt").exists()
    assert_not_loadable(output)
    expected = data_files(output)
    done = slicecast.run(*arguments)
    assert "done in" in done.stderr
    assert ": 0 waves written, " in done.stderr
    assert "read 0.00 GB in 0 requests" in done.stderr
    assert expected.items() <= data_files(output).items()
    slicecast.run("verify", output, f"--hf_model_path={kimi}")


@pytest.fixture(scope="module")
def interrupted(module_slicecast: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory in which a run was killed. Not to be changed."""
    output = tmp_path_factory.mktemp("interrupted") / "output"
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", UNSCANNED, SMALL_BUDGET]
    runs = module_slicecast.start_processes(*arguments, processes=1, prelude=SLOW)
    kill_while_writing(runs, output, [0], files=20)
    assert chunks(output)
    return output


@pytest.mark.parametrize("flag", ["--save_dtype=float32", "--scan_layers=true"])
def test_other_flags_are_refused(slicecast: Any, source: Path, interrupted: Path, tmp_path: Path, flag: str) -> None:
    """The chunks of another plan would become part of the result."""
    assert_refused(slicecast, source, interrupted, tmp_path / "output", flag)


@pytest.mark.parametrize(
    "flags",
    [
        {"files": 2},
        {"seed": 1},  # The same names, shapes and files: only the values differ, as in another step of one training.
    ],
    ids=["other-files", "other-values"],
)
def test_other_sources_are_refused(
    slicecast: Any, make_checkpoint: Callable[..., Path], interrupted: Path, tmp_path: Path, flags: dict[str, int]
) -> None:
    other = make_checkpoint(**SIZES, **flags)
    assert_refused(slicecast, other, interrupted, tmp_path / "output")


def assert_refused(slicecast: Any, source: Path, interrupted: Path, output: Path, *flags: str) -> None:
    shutil.copytree(interrupted, output)
    before = data_files(output)
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", UNSCANNED, *flags]
    done = slicecast.run("convert", *arguments, check=False)
    assert done.returncode == 1, "accepted, and mixed with what was there"
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"slicecast: OutputError: {output}")
    assert_not_loadable(output)
    assert data_files(output) == before


def test_a_missing_chunk_is_never_committed(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={kimi}", f"--base_output_directory={output}", BUDGET]
    forgotten = "params.params.decoder.moe_layers.DeepSeekMoeBlock_0.MoeBlock_0.wi_1/c/5/0/0/0"
    done = slicecast.run(*arguments, prelude=FORGET.format(key=forgotten), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("slicecast: IncompleteError: ")
    assert "1 chunks are missing" in last
    assert forgotten in last
    assert_not_loadable(output)
    before = databases(output)
    slicecast.run(*arguments)
    after = databases(output)
    (new,) = (after[name] for name in after.keys() - before.keys())
    assert new == {forgotten}
    slicecast.run("verify", output, f"--hf_model_path={kimi}")


def test_chunks_of_zeros_are_no_missing_chunks(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(kimi, source)
    for path in source.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + bytes(len(content) - start))
    slicecast.run("convert", f"--hf_model_path={source}", f"--base_output_directory={output}")
    embedding = orbax_checkpoint.open_arrays(output)["params/params/token_embedder/embedding"].read().result()
    assert not np.any(embedding.view(np.uint16))
    slicecast.run("verify", output, f"--hf_model_path={source}")


def test_a_full_disk(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """An error that says what cannot be written; with more space the run goes on."""
    output = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={kimi}", f"--base_output_directory={output}", BUDGET]
    done = slicecast.run(*arguments, prelude=FULL_DISK, check=False)
    assert done.returncode == 42
    assert_not_loadable(output)
    slicecast.run(*arguments)
    slicecast.run("verify", output, f"--hf_model_path={kimi}")
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("slicecast: StorageError: ")
    assert str(output) in last
    assert "File too large" in last


def test_a_source_that_shrinks(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """As when a download is not done; with the whole file the run goes on."""
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(kimi, source)
    file = source / "model-00003-of-000003.safetensors"
    arguments = ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}", BUDGET]
    done = slicecast.run(*arguments, prelude=SHRINK.format(file=str(file)), check=False)
    assert done.returncode == 42
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"slicecast: ReadError: {file.name}: ")
    assert "run the same command again" in last
    assert_not_loadable(output)
    shutil.copy(kimi / file.name, file)
    slicecast.run(*arguments)
    slicecast.run("verify", output, f"--hf_model_path={source}")


def test_an_interrupt_from_the_keyboard(slicecast: Any, source: Path, tmp_path: Path) -> None:
    """Ends the run soon, without a stack trace."""
    output = tmp_path / "output"
    arguments = ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}", UNSCANNED, SMALL_BUDGET]
    run = slicecast.start(*arguments, prelude=SLOW.replace("0.01", "0.2"))
    assert until(lambda: bool(list(output.glob("0*/items*/ocdbt.process_*/manifest.ocdbt"))))
    run.process.send_signal(signal.SIGINT)
    done = run.wait(timeout=15)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "slicecast: interrupted; run the same command again to go on."
    assert_not_loadable(output)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100, 130))
def test_campaign_of_kills(campaign: Campaign, seed: int) -> None:
    """Any number of processes, killed at any moment, any number of times."""
    rng = random.Random(seed)
    for _ in range(rng.randrange(1, 5)):
        processes = rng.choice([1, 1, 2])
        victims = rng.sample(range(processes), rng.randrange(1, processes + 1))
        budget = f"--host_memory_gb={rng.choice([0.002, 0.0025, 0.003])}"
        campaign.interrupted(processes, victims, files=rng.randrange(35), budget=budget)
    campaign.completed(processes=rng.choice([1, 2, 4]), budget=f"--host_memory_gb={rng.choice([0.002, 0.01, 1])}")
    campaign.verified()


# More than the steps that Orbax takes; a conversion that is to be killed at a later one just ends.
STEPS = 30


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(1, STEPS))
def test_campaign_of_steps(slicecast: Any, source: Path, tmp_path: Path, number: int) -> None:
    """Each step of Orbax from a fresh start, and then once more, and the run goes on at once."""
    campaign = Campaign(slicecast, source, tmp_path / "output")
    if campaign.killed_at(number) and campaign.killed_at(STEPS - number):
        campaign.completed()
    campaign.verified()


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(10, STEPS))
def test_campaign_of_steps_of_two_processes(slicecast: Any, kimi: Path, tmp_path: Path, number: int) -> None:
    """Process 0 is killed in the commit, while the other one waits for it."""
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", BUDGET]
    prelude = KILL_AT.format(output=str(output), number=number)
    runs = slicecast.start_processes(*arguments, prelude=prelude)
    assert until(lambda: not runs[0].running)
    for run in runs:
        run.kill()
    if runs[0].process.returncode == -signal.SIGKILL:
        assert_not_loadable(output)
        slicecast.run_processes(*arguments)
    slicecast.run("verify", output, f"--hf_model_path={kimi}")
