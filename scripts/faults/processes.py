"""Starts the processes of a conversion, sends them signals, and notes what they say and how they end."""

import functools
import heapq
import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from faults import child

# A fork of a server that has imported everything, and has not started JAX, is there after some milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")


class Process:
    """One process.

    Attributes:
        signals: The signals that were sent to it.
        phases: How often each phase has begun, and under `struck` whether a fault of its disk has happened.
        phase: The phase that began last.
        text: What it has written.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], settings: child.Settings):
        """Starts the process."""
        self.signals: list[signal.Signals] = []
        self.phases: Counter[str] = Counter()
        self.phase = "start"
        self.text = ""
        self._events, events = CONTEXT.Pipe(duplex=False)
        self._output, output = CONTEXT.Pipe(duplex=False)
        ends = (events, output)
        self._process = CONTEXT.Process(target=child.run, args=(arguments, environment, settings, *ends), daemon=True)
        self._process.start()
        for end in ends:
            end.close()
        self._open = {self._events, self._output}

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return bool(self._process.is_alive())

    @property
    def exit_code(self) -> int:
        """As in `subprocess`: negative for a signal. Only once the process has ended."""
        code = self._process.exitcode
        assert code is not None
        return code

    @property
    def sources(self) -> list[Any]:
        """What to wait for."""
        return [*self._open, *([self._process.sentinel] if self.running else [])]

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the process still runs."""
        if self.running and self._process.pid is not None:
            self.signals.append(number)
            os.kill(self._process.pid, number)

    def read(self, ready: Sequence[Any]) -> list[str]:
        """Takes what has come from the process; returns the phases that have begun."""
        begun: list[str] = []
        for connection in self._open.intersection(one for one in ready if isinstance(one, Connection)):
            data = os.read(connection.fileno(), 1 << 16).decode(errors="replace")
            if not data:
                connection.close()
                self._open.remove(connection)
            elif connection is self._output:
                self.text += data
            else:
                begun += data.split()
        self.phases.update(begun)
        self.phase = next((phase for phase in reversed(begun) if phase in child.PHASES), self.phase)
        return begun


class Cluster:
    """Processes that carry out one command together.

    Attributes:
        processes: The processes.
        phases: How often each phase has begun on any of them.
        phase: The phase that began last on any of them.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        settings: Sequence[child.Settings],
    ):
        """Starts one process for each of `settings`."""
        self.phases: Counter[str] = Counter()
        self.phase = "start"
        together: list[list[str]] = [[]]
        if len(settings) > 1:
            address = f"127.0.0.1:{_free_port()}"
            together = [
                [f"--coordinator_address={address}", f"--num_processes={len(settings)}", f"--process_id={number}"]
                for number in range(len(settings))
            ]
        self.processes = [
            Process([*arguments, *own], environment, of_process)
            for own, of_process in zip(together, settings, strict=True)
        ]

    @property
    def running(self) -> bool:
        """Whether one of them still runs."""
        return any(process.running for process in self.processes)

    @property
    def failed(self) -> bool:
        """Whether one of them has ended with an error, so that the others cannot finish."""
        return any(not process.running and process.exit_code for process in self.processes)

    def send(self, number: signal.Signals, victims: Sequence[int] | None = None) -> None:
        """Sends a signal to some processes, or to all."""
        for victim in range(len(self.processes)) if victims is None else victims:
            self.processes[victim].send(number)

    def read(self, ready: Sequence[Any]) -> None:
        """Takes what has come from the processes."""
        for process in self.processes:
            begun = process.read(ready)
            self.phases.update(begun)
            self.phase = next((phase for phase in reversed(begun) if phase in child.PHASES), self.phase)


class Supervisor:
    """Waits for clusters, and does things at their time."""

    def __init__(self) -> None:
        self.clusters: list[Cluster] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Does something after some time, if `run` still waits then."""
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._numbers), action))

    def run(self, look: Callable[[], None], limit_seconds: float) -> bool:
        """Waits until all processes have ended; False, and they are killed, if they have not within the limit.

        Args:
            look: Called after each thing that happened.
            limit_seconds: The limit.
        """
        deadline = time.monotonic() + limit_seconds
        in_time = True
        while sources := [source for cluster in self.clusters for one in cluster.processes for source in one.sources]:
            now = time.monotonic()
            if in_time and now > deadline:
                in_time = False
                for cluster in self.clusters:
                    cluster.send(signal.SIGCONT)
                    cluster.send(signal.SIGUSR1)  # They say where they are.
                    self.after(1.0, functools.partial(cluster.send, signal.SIGKILL))
            while self._agenda and self._agenda[0][0] <= now:
                heapq.heappop(self._agenda)[2]()
            next_time = min([deadline, *(due for due, _, _ in self._agenda[:1])])
            ready = wait(sources, timeout=min(1.0, max(0.001, next_time - now)))
            for cluster in self.clusters:
                cluster.read(ready)
            if in_time:
                look()
        return in_time


def call(function: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends to the connection that it gets as last argument, in a process of its own.

    Raises:
        RuntimeError: If it sends nothing.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} failed; its stack trace is above") from None
    finally:
        process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
