"""Carries out a round, and checks after each start what is there."""

import functools
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from faults import child, outputs, plan
from faults.child import DiskFault
from faults.outputs import Found
from faults.places import LOCAL, Places
from faults.plan import Attempt, Fault, Round
from faults.processes import Cluster, Process, Supervisor, call

# Longer than any attempt takes on a loaded machine. TensorStore waits for 95 seconds after seven failures in a row.
LIMIT_SECONDS = 180.0

# JAX takes a process for dead that says nothing for 20 seconds in the program. Here that is waited for more often.
_HEARTBEAT_SECONDS = 20
_SHORT_HEARTBEAT_SECONDS = 5
_LOST_SECONDS = 12.0

# A bucket takes one change of the same object a second; the stand-in takes more.
_BUCKET_SECONDS = 0.05

# Of the undisturbed conversions: three dozen waves.
_REFERENCE_GB = 0.003

_DISK_KINDS = {plan.DISK_FULL: "full", plan.READ_ERROR: "error", plan.SHORT_READS: "short"}

# How errors of ours end.
_LAST_LINE = re.compile(r"slicecast: (\w+Errors?: |ended by SIGTERM)")

Digests = Mapping[str, str]


class WrongError(Exception):
    """Something that must not be."""


@dataclass
class Report:
    """What has happened in a round.

    Attributes:
        attempts: How often the command was started.
        struck: Each fault that happened, and in which phase.
        missed: Faults whose moment did not come.
        outcomes: What each start left.
        exit_codes: Those of all processes.
        regrouped: How often another number of processes went on.
        seconds: Time taken.
        wrong_values: Leaves with wrong values.
        failure: What must not have been; "" if all is well.
    """

    attempts: int = 0
    struck: list[tuple[str, str]] = field(default_factory=list)
    missed: int = 0
    outcomes: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    regrouped: int = 0
    seconds: float = 0.0
    wrong_values: int = 0
    failure: str = ""


def reference(places: Places, name: str, *, scanned: bool) -> Found:
    """What an undisturbed conversion leaves; it is verified.

    Raises:
        WrongError: If it is wrong.
    """
    source, output = places.source_in(LOCAL), places.output_in(LOCAL, name)
    flags = [f"--hf_model_path={source}", f"--host_memory_gb={_REFERENCE_GB}"]
    for command in (
        ["convert", f"--base_output_directory={output}", f"--scan_layers={scanned}", *flags],
        ["verify", output, *flags],
    ):
        supervisor = Supervisor()
        settings = child.Settings(_HEARTBEAT_SECONDS, _BUCKET_SECONDS, "", None)
        supervisor.clusters.append(Cluster(command, places.environment, [settings]))
        supervisor.run(lambda: None, LIMIT_SECONDS)
        (process,) = supervisor.clusters[0].processes
        if process.exit_code:
            raise WrongError(_tail(process))
    found: Found = call(outputs.look, output)
    wrong = outputs.decoded(places.source, scanned=scanned).items() - found.leaves.items()
    if wrong:
        raise WrongError(f"the undisturbed conversion is wrong: {sorted(dict(wrong))}")
    return found


def run(
    planned: Round, places: Places, references: Mapping[bool, Found], say: Callable[[str], None], prelude: str
) -> Report:
    """Carries out a round.

    Args:
        planned: The round.
        places: Where sources and outputs are.
        references: What is to come out, scanned or not.
        say: Told what happens.
        prelude: Python code that each process runs first.
    """
    report = Report()
    begin = time.monotonic()
    name = f"{planned.seed}-{planned.number}"
    reference = references[planned.scanned]
    output = places.output_in(planned.output, name)
    try:
        for number, attempt in enumerate(planned.attempts):
            report.attempts += 1
            report.regrouped += number > 0 and attempt.processes != planned.attempts[number - 1].processes
            clusters, struck = _start(planned, attempt, places, output, prelude)
            report.struck += struck
            report.missed += len(attempt.faults) - len(struck)
            for cluster in clusters:
                for process in cluster.processes:
                    say(f"  a process of {len(cluster.processes)}: {process.exit_code}, in {process.phase}")
            found: Found = call(outputs.look, output)
            left = "finished" if found.finished else "not committed" if found.leaves else "nothing to load"
            codes = [process.exit_code for cluster in clusters for process in cluster.processes]
            report.outcomes.append(f"{left}, {'without' if not any(codes) else 'with'} failed processes")
            report.exit_codes += codes
            say(f"  {attempt.processes} processes, {struck or 'no fault'}: {left}, exit codes {codes}")
            if found.finished or found.leaves:
                wrong = _differences(found.leaves, reference.leaves)
                report.wrong_values += len(wrong)
                if wrong:
                    raise WrongError(f"WRONG VALUES in {len(wrong)} leaves: {wrong[:3]}")
            _judge(clusters, struck, finished=found.finished)
            if found.finished and not any(codes):
                if wrong := _differences(found.summary, reference.summary):
                    raise WrongError(f"the summary has wrong digests of {len(wrong)} leaves: {wrong[:3]}")
                break
    except WrongError as error:
        report.failure = str(error)
    places.remove_output(planned.output, name)
    report.seconds = time.monotonic() - begin
    return report


def _differences(found: Digests, wanted: Digests) -> list[str]:
    return sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))


def _start(
    planned: Round, attempt: Attempt, places: Places, output: str, prelude: str
) -> tuple[list[Cluster], list[tuple[str, str]]]:
    """Starts the command once, lets go wrong what is to, and waits for the end of all processes."""
    supervisor = Supervisor()
    strikes = _Strikes(planned, attempt, places, output, prelude, supervisor)
    strikes.start(attempt.faults)
    try:
        in_time = supervisor.run(strikes.look, LIMIT_SECONDS)
    finally:
        places.mend()
    if not in_time:
        texts = "\n".join(process.text for cluster in supervisor.clusters for process in cluster.processes)
        raise WrongError(f"HANGS: not done after {LIMIT_SECONDS:g} s, {strikes.struck}; processes said:\n{texts}")
    return supervisor.clusters, strikes.all_struck()


class _Strikes:
    """The faults of an attempt."""

    def __init__(
        self,
        planned: Round,
        attempt: Attempt,
        places: Places,
        output: str,
        prelude: str,
        supervisor: Supervisor,
    ):
        self._planned = planned
        self._attempt = attempt
        self._places = places
        self._output = output
        self._prelude = prelude
        self._supervisor = supervisor
        self._waiting: list[Fault] = []
        self._mourned: set[int] = set()
        self.struck: list[tuple[str, str]] = []

    def start(self, faults: Sequence[Fault]) -> None:
        """Starts the processes, with these faults ahead."""
        attempt, planned = self._attempt, self._planned
        disks = {
            fault.victims[0]: DiskFault(_DISK_KINDS[fault.kind], fault.moment.phase, fault.moment.count)
            for fault in faults
            if fault.kind in _DISK_KINDS
        }
        self._waiting += [fault for fault in faults if fault.kind not in _DISK_KINDS]
        heartbeat = _SHORT_HEARTBEAT_SECONDS if attempt.patient else _HEARTBEAT_SECONDS
        self._supervisor.clusters.append(
            Cluster(
                [
                    "convert",
                    f"--hf_model_path={self._places.source_in(attempt.source)}",
                    f"--base_output_directory={self._output}",
                    f"--scan_layers={planned.scanned}",
                    f"--checkpoint_storage_use_ocdbt={planned.ocdbt}",
                    f"--host_memory_gb={attempt.budget_gb}",
                    f"--simulated_cpu_devices_count={attempt.devices}",
                ],
                self._places.environment,
                [
                    child.Settings(heartbeat, _BUCKET_SECONDS, self._prelude, disks.get(number))
                    for number in range(attempt.processes)
                ],
            )
        )

    def look(self) -> None:
        """Called after each thing that happened: is it time for a fault, or to end those that wait in vain?"""
        clusters = self._supervisor.clusters
        for fault in [*self._waiting]:
            if clusters[0].phases[fault.moment.phase] >= fault.moment.count:
                self._waiting.remove(fault)
                self._supervisor.after(fault.moment.seconds, functools.partial(self._strike, fault))
        for number, cluster in enumerate(clusters):
            # JAX lets processes wait for those that never came for five minutes.
            waits_in_vain = not self._attempt.patient or cluster.phases["plan"] < len(cluster.processes)
            if cluster.failed and waits_in_vain and number not in self._mourned:
                # As schedulers do, which then start all of them again.
                self._mourned.add(number)
                self._supervisor.after(self._attempt.grace_seconds, functools.partial(cluster.send, signal.SIGKILL))

    def _strike(self, fault: Fault) -> None:
        cluster = self._supervisor.clusters[0]
        if not cluster.running:
            return
        self.struck.append((fault.kind, cluster.phase))
        after = self._supervisor.after
        match fault.kind:
            case plan.KILL:
                cluster.send(signal.SIGKILL, fault.victims)
            case plan.TERMINATE:
                cluster.send(signal.SIGTERM, fault.victims)
            case plan.PAUSE | plan.FREEZE | plan.LOSE:
                cluster.send(signal.SIGSTOP, fault.victims)
                then = signal.SIGKILL if fault.kind == plan.FREEZE else signal.SIGCONT
                seconds = _LOST_SECONDS if fault.kind == plan.LOSE else fault.seconds
                after(seconds, functools.partial(cluster.send, then, fault.victims))
            case plan.RIVAL:
                self.start(())
            case plan.RETURNING_RIVAL:
                cluster.send(signal.SIGSTOP)
                self.start(())
                after(2 * fault.seconds, functools.partial(cluster.send, signal.SIGCONT))
            case plan.OUTAGE:
                self._places.fail(fault.place, "busy", fault.times)
            case _:
                self._places.fail(fault.place, fault.kind, fault.times)

    def all_struck(self) -> list[tuple[str, str]]:
        """All faults that happened, those of disks too, and in which phases."""
        disks = [
            (fault.kind, fault.moment.phase)
            for fault in self._attempt.faults
            if fault.kind in _DISK_KINDS and self._supervisor.clusters[0].phases["struck"]
        ]
        return self.struck + disks


def _judge(clusters: Sequence[Cluster], struck: Sequence[tuple[str, str]], *, finished: bool) -> None:
    """Checks the exit codes, and what was written.

    Raises:
        WrongError: If one is not as documented.
    """
    kinds = {kind for kind, _ in struck}
    codes = [[process.exit_code for process in cluster.processes] for cluster in clusters]
    said = "\n".join(_tail(process) for cluster in clusters for process in cluster.processes)
    if kinds <= set(plan.HARMLESS) and any(map(any, codes)):
        raise WrongError(f"exit codes {codes} after {struck or 'no fault at all'}; processes said:\n{said}")
    if any(not any(of_cluster) for of_cluster in codes) and not finished:
        raise WrongError(f"NOTHING THERE although all processes ended with 0; processes said:\n{said}")
    rivals = {plan.RIVAL, plan.RETURNING_RIVAL} & kinds
    if rivals and all(map(any, codes)):
        raise WrongError(f"exit codes {codes} after {struck}: both runs failed; processes said:\n{said}")
    for cluster in clusters:
        for process in cluster.processes:
            if complaint := _complaint(process, cluster):
                raise WrongError(f"{complaint}, after {struck}; all processes said:\n{said}")


def _complaint(process: Process, cluster: Cluster) -> str:
    """What is wrong with the end of one process, if something is."""
    code, signals = process.exit_code, process.signals
    if code == 0 or (code == -signal.SIGKILL and signal.SIGKILL in signals):
        return ""
    # Until it has joined the others, a process has no handler.
    if signal.SIGTERM in signals and code == -signal.SIGTERM and process.phase == "start":
        return ""
    # JAX ends those that wait for a process that is gone.
    if code == -signal.SIGABRT and any(other.exit_code for other in cluster.processes if other is not process):
        return ""
    last = next((line for line in reversed(process.text.splitlines()) if line.startswith("slicecast: ")), "")
    # 42: something that may pass, such as a failure of storage.
    documented = code == 143 if "SIGTERM" in last else code in (1, 42)
    if documented and _LAST_LINE.match(last) and "Traceback" not in process.text:
        return ""
    return f"exit code {code} in {process.phase} with the last line {last!r}"


def _tail(process: Process) -> str:
    return f"[{process.exit_code}, in {process.phase}]\n" + "\n".join(process.text.splitlines()[-12:])
