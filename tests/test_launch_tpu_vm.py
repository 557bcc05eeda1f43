"""launch_tpu_vm.sh at work: it starts, watches, restarts and deletes, with a stand-in for gcloud and its slices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ("gcloud", "uv", "python", "sleep")

# The longest that a launcher may take here, on a loaded machine; a hang ends here.
TIMEOUT_SECONDS = 120.0

CONVERT = ("convert", "--hf_model_path=gs://bucket/a b", "--base_output_directory=gs://bucket/it's")
NEW_SLICE = ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot")


class Cloud:
    """A folder in which launch_tpu_vm.sh runs, with slices that are folders; see fake_gcloud.py.

    Attributes:
        directory: The folder.
        launchers: The launchers that were started.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.launchers: list[subprocess.Popen[bytes]] = []
        shutil.copytree(ROOT / "scripts", directory / "repository" / "scripts", ignore=lambda *_: ["__pycache__"])
        shutil.copy(ROOT / "pyproject.toml", directory / "repository")
        (directory / "bin").mkdir()
        for name in PROGRAMS:
            program = directory / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_gcloud.py {name} "$@"\n')
            program.chmod(0o755)
        (directory / "after_create").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
        (directory / "exits").mkdir()

    def set(self, states: Sequence[str], exits: Sequence[Sequence[str]]) -> None:
        """Decides what `describe` says, and how slicecast ends on each worker, start by start."""
        (self.directory / "states").write_text("\n".join(states))
        for worker, codes in enumerate(exits):
            (self.directory / f"worker-{worker}").mkdir(exist_ok=True)
            (self.directory / "exits" / str(worker)).write_text("".join(f"{code}\n" for code in codes))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts the launcher."""
        # A file, not a pipe: what goes on on the workers would keep a pipe open, which SSH does not.
        with open(self.directory / "output", "w") as output:
            launcher = subprocess.Popen(
                [self.directory / "repository/scripts/launch_tpu_vm.sh", "--name=kimi", "--zone=us-west4-a", *words],
                env={
                    **os.environ,
                    "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
                    "PYTHON": str(self.directory / "bin" / "python"),
                    "FAKE_GCLOUD": str(self.directory),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.launchers.append(launcher)
        return launcher

    def finish(self, launcher: subprocess.Popen[bytes]) -> tuple[int, str]:
        """The exit code and the output of a launcher, once it has ended."""
        code = launcher.wait(TIMEOUT_SECONDS)
        return code, (self.directory / "output").read_text()

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Runs the launcher to its end."""
        return self.finish(self.start(*words, **environment))

    def worker(self, subcommand: str) -> str:
        """What a subcommand of tpu_vm_worker.sh prints on worker 0."""
        script = self.directory / "worker-0" / ".slicecast" / "tpu_vm_worker.sh"
        return subprocess.run(["bash", script, subcommand], capture_output=True, text=True, check=True).stdout

    def calls(self) -> list[str]:
        """The subcommands of gcloud in order, with what workers were told to do."""
        names = []
        log = self.directory / "calls.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            words = json.loads(line)
            command = next((word for word in words if word.startswith("--command=bash")), None)
            names.append(command.split()[2] if command else words[4])
        return [name for name in names if name != "describe"]

    def received(self, worker: int) -> list[str]:
        """The words that slicecast got on a worker, of all its starts."""
        return (self.directory / f"worker-{worker}" / "arguments").read_text().split("\0")[:-1]

    def log(self, worker: int) -> str:
        """What slicecast wrote on a worker."""
        return (self.directory / f"worker-{worker}" / ".slicecast" / "log").read_text()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud")
    yield made
    # Nothing outlives the test.
    for launcher in made.launchers:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if (made.directory / "worker-0" / ".slicecast" / "group").exists():
        made.worker("stop")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PREPARE = ["ssh", "scp", "start"]  # A directory, the files, slicecast.
WATCH = ["follow", "status"]


def test_a_slice_is_created_used_and_deleted(cloud: Cloud) -> None:
    cloud.set(["ABSENT"], [["0"], ["0"]])
    code, output = cloud.run(*NEW_SLICE, "--delete", "--", *CONVERT)
    assert code == 0, output
    assert cloud.calls() == ["create", *PREPARE, *WATCH, "delete"]
    assert "kimi is WAITING_FOR_RESOURCES" in output
    for worker in (0, 1):
        assert cloud.received(worker) == list(CONVERT)


def test_an_existing_slice_is_used_and_kept(cloud: Cloud) -> None:
    cloud.set(["STARTING", "READY"], [["0"]])
    code, output = cloud.run("--", *CONVERT)
    assert code == 0, output
    assert cloud.calls() == [*PREPARE, *WATCH]
    assert "costs money until it is deleted: gcloud compute tpus tpu-vm delete kimi --zone=us-west4-a" in output


@pytest.mark.parametrize("code", ["1", "2"])
def test_an_error_that_would_come_again_is_final(cloud: Cloud, code: str) -> None:
    """The other host has noticed that this one is gone, which alone would be a reason to start again."""
    cloud.set(["READY"], [["134"], [code]])
    exit_code, output = cloud.run("--delete", "--", *CONVERT)
    assert exit_code == int(code), output
    assert cloud.calls() == [*PREPARE, *WATCH, "delete"]


def test_a_lost_host_is_a_reason_to_start_again(cloud: Cloud) -> None:
    cloud.set(["READY"], [["134", "137", "0"], ["143", "134", "0"]])
    code, output = cloud.run("--", *CONVERT)
    assert code == 0, output
    assert cloud.calls() == 3 * [*PREPARE, *WATCH]
    assert cloud.received(1) == 3 * list(CONVERT)


def test_a_preempted_slice_is_created_again(cloud: Cloud) -> None:
    cloud.set(["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], [["143", "0"], ["143", "0"]])
    code, output = cloud.run(*NEW_SLICE, "--", *CONVERT)
    assert code == 0, output
    assert cloud.calls() == [*PREPARE, *WATCH, "delete", "create", *PREPARE, *WATCH]
    assert cloud.received(0) == list(CONVERT)  # On the new slice; the first one's disks are gone.


def test_a_preempted_slice_of_others_is_not_created_again(cloud: Cloud) -> None:
    cloud.set(["READY", "READY", "PREEMPTED"], [["143"]])
    code, output = cloud.run("--", *CONVERT)
    assert code == 3
    assert "kimi is PREEMPTED" in output
    assert cloud.calls() == [*PREPARE, *WATCH]


def test_restarts_have_an_end(cloud: Cloud) -> None:
    cloud.set(["READY"], [["137", "137", "137", "137"]])
    code, output = cloud.run("--max-restarts=2", "--", *CONVERT)
    assert code == 3, output
    assert cloud.calls() == 3 * [*PREPARE, *WATCH]


def test_the_token_reaches_slicecast_as_a_file(cloud: Cloud, tmp_path: Path) -> None:
    token_file = tmp_path / "token of mine"
    token_file.write_text("hf_secret")
    cloud.set(["READY"], [["0"]])
    code, output = cloud.run(f"--hf-token-file={token_file}", "--", *CONVERT)
    assert code == 0, output
    copied = cloud.directory / "worker-0" / ".slicecast" / "hf_token"
    assert copied.read_text() == "hf_secret"
    assert copied.parent.stat().st_mode & 0o077 == 0
    assert f"token file: {copied}" in cloud.log(0)
    assert "hf_secret" not in output + cloud.log(0) + (cloud.directory / "calls.jsonl").read_text()


def test_slicecast_outlives_the_launcher(cloud: Cloud) -> None:
    """The launcher is killed; another one watches the same run, and does not start it twice."""
    cloud.set(["READY"], [["wait"]])
    first = cloud.start("--", *CONVERT)
    wait_for(lambda: cloud.calls().count("follow") == 1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(TIMEOUT_SECONDS)
    second = cloud.start("--", *CONVERT)
    wait_for(lambda: cloud.calls().count("follow") == 2)
    assert cloud.worker("status") == "running\n"
    assert cloud.received(0) == list(CONVERT)
    cloud.worker("stop")
    code, output = cloud.finish(second)
    assert code == 3, output
    assert "It runs already: == " in output
    # It was asked to end, not killed.
    assert (cloud.directory / "worker-0" / ".slicecast" / "status").read_text() == "143\n"


def test_ctrl_c_ends_the_watching_only(cloud: Cloud) -> None:
    cloud.set(["READY"], [["wait"]])
    launcher = cloud.start("--", *CONVERT)
    wait_for(lambda: "follow" in cloud.calls())
    wait_for((cloud.directory / "worker-0" / "arguments").exists)
    os.killpg(launcher.pid, signal.SIGINT)
    code, output = cloud.finish(launcher)
    assert code == 130, output
    assert cloud.worker("status") == "running\n"
    stop = output.partition("to end it: ")[2].splitlines()[0]
    environment = {"PATH": f"{cloud.directory / 'bin'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(cloud.directory)}
    subprocess.run(stop, shell=True, check=True, env={**os.environ, **environment}, timeout=TIMEOUT_SECONDS)
    assert cloud.worker("status") == "stopped\n"


def test_slicecast_itself_is_launched(cloud: Cloud, llama: Path, tmp_path: Path) -> None:
    cloud.set(["READY"], [[]])
    output_directory = tmp_path / "a converted 'model'"
    program = str(Path(sys.executable).parent / "slicecast")
    convert = ("convert", f"--hf_model_path={llama}", f"--base_output_directory={output_directory}")
    code, output = cloud.run("--", *convert, "--simulated_cpu_devices_count=2", FAKE_SLICECAST=program)
    assert code == 0, output
    assert f"load_parameters_path={output_directory}/0/items" in output
    verified = subprocess.run([program, "verify", output_directory, f"--hf_model_path={llama}"], capture_output=True)
    assert verified.returncode == 0
