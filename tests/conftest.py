"""What several test files share: made-up checkpoints, and the command line in processes of its own."""

import os

# Before anything imports JAX; the processes that tests start inherit it. libtpu is installed, but here is no TPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib.util
import itertools
import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from program import CLI, SCRIPT, TIMEOUT_SECONDS

# Simulated devices of all processes of a conversion together.
DEVICES = 8

# Lines with which C++ libraries greet on stderr.
NOISE = ("[Gloo]",)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a checkpoint with the flags of `scripts/make_checkpoint.py`, once for the same flags."""
    specification = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    sys.modules["make_checkpoint"] = script  # Dataclasses look their module up.
    specification.loader.exec_module(script)
    made: dict[str, Path] = {}

    def make(**flags: Any) -> Path:
        key = repr(sorted(flags.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "checkpoint"
            script.write_checkpoint(str(made[key]), **flags)
        return made[key]

    return make


@pytest.fixture(scope="session")
def kimi(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Kimi-K2.6: INT4 experts, three files, a vision tower. Not to be changed."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def llama(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Llama 3.1. Not to be changed."""
    return make_checkpoint(family="llama", files=2)


class Run:
    """A process of the command line.

    Attributes:
        process: The process.
    """

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]):
        # Files, not pipes: nobody empties a pipe while another process is waited for.
        directory.mkdir()
        self._out, self._err = directory / "stdout", directory / "stderr"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **environment}
            )

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    @property
    def stdout(self) -> str:
        """What it has written to its standard output."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to its standard error, without the noise of libraries."""
        lines = self._err.read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(NOISE))

    def kill(self) -> None:
        """Ends the process as `kill -9` does."""
        self.process.kill()
        self.process.wait(TIMEOUT_SECONDS)

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
        """What the process did, once it has ended; a failure of the test if it does not end."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self.process.args!r} hangs; it wrote:\n{self.stderr[-3000:]}")
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, self.stdout, self.stderr)


# Runs code, each time in a fork of a process that has imported the program but has no threads: seconds are saved.
SERVER = """
import json, os, sys
from slicecast.convert import cli, commands, describe
assert len(os.listdir("/proc/self/task")) == 1
for request in sys.stdin:
    code, arguments, out, err = json.loads(request)
    child = os.fork()
    if not child:
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv[1:] = arguments
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs Python code, each time in a process of its own, one after another."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
        """Runs code, which finds the arguments in `sys.argv`, to its end, which must come soon."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = self._directory / "stdout", self._directory / "stderr"
        self._process.stdin.write(json.dumps([code, list(map(str, arguments)), str(out), str(err)]) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], TIMEOUT_SECONDS)[0]:
            self.close()
            pytest.fail(f"{arguments} hangs; it wrote:\n{err.read_text()[-3000:]}")
        code_of_exit = int(self._process.stdout.readline())
        return subprocess.CompletedProcess([*map(str, arguments)], code_of_exit, out.read_text(), err.read_text())

    def close(self) -> None:
        """Ends the server, and what it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs command lines; ends with the session."""
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


class Slicecast:
    """The command line in processes of its own."""

    def __init__(self, directory: Path, server: Server):
        self._directory = directory
        self._server = server
        self._numbers = itertools.count()
        self._runs: list[Run] = []

    def start(self, *arguments: object, prelude: str = "", environment: Mapping[str, str] | None = None) -> Run:
        """Starts a process that may be killed, or work together with others.

        Args:
            *arguments: The command line.
            prelude: Python code to be run first, in the same process.
            environment: Variables beside the tests' own.
        """
        program = ["-c", prelude + CLI] if prelude else ["-m", "slicecast.convert"]
        command = [sys.executable, *program, *map(str, arguments)]
        self._runs.append(Run(command, self._directory / str(next(self._numbers)), environment or {}))
        return self._runs[-1]

    def run(self, *arguments: object, check: bool = True, prelude: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a process to its end; with `check`, its failure is a failure of the test. `prelude` is as in `start`."""
        return self.execute(prelude + CLI, *arguments, check=check)

    def execute(self, code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs other Python code in a process of its own, which has the program imported and JAX not started."""
        done = self._server.run(code, arguments)
        assert not check or done.returncode == 0, done.stderr
        return done

    def start_processes(
        self,
        *arguments: object,
        processes: int = 2,
        extra: Mapping[int, Sequence[object]] | None = None,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        prelude: str = "",
    ) -> list[Run]:
        """Starts `convert` in processes that work together.

        Args:
            *arguments: The command line of each, without the subcommand.
            processes: How many.
            extra: Further arguments of single processes, by their number.
            environments: Further variables of single processes, by their number.
            prelude: Python code to be run first, in each.
        """
        cluster: list[object] = [f"--simulated_cpu_devices_count={DEVICES // processes}"]
        if processes > 1:
            cluster += [f"--coordinator_address=127.0.0.1:{_free_port()}", f"--num_processes={processes}"]
        runs = []
        for i in range(processes):
            own = [*cluster, *([f"--process_id={i}"] if processes > 1 else []), *(extra or {}).get(i, ())]
            environment = (environments or {}).get(i)
            runs.append(self.start("convert", *arguments, *own, prelude=prelude, environment=environment))
        return runs

    def run_processes(
        self, *arguments: object, check: bool = True, timeout: float = TIMEOUT_SECONDS, **options: Any
    ) -> list[subprocess.CompletedProcess[str]]:
        """Runs `start_processes` to the end of all, which must come within `timeout` seconds."""
        runs = self.start_processes(*arguments, **options)
        deadline = time.monotonic() + timeout
        done = [run.wait(max(0.1, deadline - time.monotonic())) for run in runs]
        assert not check or all(one.returncode == 0 for one in done), "\n".join(one.stderr for one in done)
        return done

    def close(self) -> None:
        """Ends all processes that still run."""
        for run in self._runs:
            run.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def slicecast(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Slicecast]:
    """Starts the command line; no process outlives the test."""
    starter = Slicecast(tmp_path_factory.mktemp("runs"), server)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def module_slicecast(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Slicecast]:
    """As `slicecast`, for what the tests of a module share; no process outlives the module."""
    starter = Slicecast(tmp_path_factory.mktemp("runs"), server)
    yield starter
    starter.close()


@pytest.fixture
def run_slicecast(slicecast: Slicecast) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`Slicecast.run`: runs the command line to its end."""
    return slicecast.run
