"""What happens in a round: drawn from a seed, so that it can be repeated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from faults.places import HUB, LOCAL

# Signals to processes.
KILL, TERMINATE, PAUSE, FREEZE, LOSE = "kill", "terminate", "pause", "freeze", "lose"
# The same command once more, while the first one runs, or after it was stopped and before it goes on.
RIVAL, RETURNING_RIVAL = "rival", "returning rival"
# The disk of one process.
DISK_FULL, READ_ERROR, SHORT_READS = "disk full", "read error", "short reads"
# What stand-ins do wrong: 503, 429, connections that break, late answers, too few bytes, addresses that run out.
STORMS = ("busy", "limited", "reset", "slow", "short")
EXPIRING = "uses"
# Of 503s, longer than clients wait.
OUTAGE = "outage"

# After these all processes are to finish as if nothing had been.
HARMLESS = (PAUSE, SHORT_READS, "busy", "limited", "reset", "slow", EXPIRING)

# What is drawn, and how often.
_KINDS = {
    KILL: 30, TERMINATE: 15, PAUSE: 8, FREEZE: 5, LOSE: 4, RIVAL: 6, RETURNING_RIVAL: 6,
    DISK_FULL: 8, READ_ERROR: 4, SHORT_READS: 3, "storm": 20, EXPIRING: 3, OUTAGE: 2,
}  # fmt: skip

# Where faults strike, and how often. The last three are short, and decide what is there.
_PHASES = {"start": 3, "plan": 5, "read": 20, "write": 30, "merge": 16, "commit": 20, "summary": 6}

# Requests that fail in one storm. If they are those of one client, gcsfs gives up after six.
_STORM = range(1, 6)
_OUTAGE = 7


@dataclass(frozen=True)
class Moment:
    """When something happens.

    Attributes:
        phase: The phase that begins then.
        count: The how-manyth beginning, on all processes together.
        seconds: How much later.
    """

    phase: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: What.
        moment: When.
        victims: Which processes.
        seconds: How long, for those that pass.
        place: Whose stand-in, for storms.
        times: How often.
    """

    kind: str
    moment: Moment
    victims: tuple[int, ...] = ()
    seconds: float = 0.0
    place: str = ""
    times: int = 0


@dataclass(frozen=True)
class Attempt:
    """One start of the command.

    Attributes:
        source: The place of the source.
        processes: How many processes.
        devices: How many devices each has.
        budget_gb: The memory budget of each.
        faults: What goes wrong.
        patient: Whether nobody ends the processes that wait for one that is gone.
        grace_seconds: Otherwise, how long they wait before somebody does.
    """

    source: str
    processes: int
    devices: int
    budget_gb: float
    faults: tuple[Fault, ...]
    patient: bool
    grace_seconds: float


@dataclass(frozen=True)
class Round:
    """A conversion, started until it is finished.

    Attributes:
        seed: The seed of all rounds.
        number: The number of this one.
        output: The place of the output.
        scanned: Whether layers are stacked.
        ocdbt: Whether chunks lie in databases.
        attempts: The starts; nothing goes wrong in the last one.
    """

    seed: int
    number: int
    output: str
    scanned: bool
    ocdbt: bool
    attempts: tuple[Attempt, ...]


def draw(seed: int, number: int, places: Sequence[str]) -> Round:
    """The round of this number."""
    rng = random.Random(f"{seed}-{number}")
    source = rng.choice(places)
    output = rng.choice([place for place in places if place != HUB] or [LOCAL])
    ocdbt = rng.random() < 0.85
    faulty = rng.choice([1, 1, 1, 2, 2, 3])
    attempts = []
    for attempt in range(faulty + 1):
        # Another copy of the same source is the same source.
        now = rng.choice(places) if rng.random() < 0.1 else source
        attempts.append(_attempt(rng, now, output, ocdbt, first=attempt == 0, last=attempt == faulty))
    return Round(seed, number, output, rng.random() < 0.5, ocdbt, tuple(attempts))


def _attempt(rng: random.Random, source: str, output: str, ocdbt: bool, *, first: bool, last: bool) -> Attempt:
    processes = rng.choice([1, 1, 2, 2, 4])
    faults = [] if last else [_fault(rng, source, output, processes, ocdbt, first)]
    if faults and faults[0].kind not in STORMS and {source, output} != {LOCAL} and rng.random() < 0.2:
        faults.append(_storm(rng, source, output, ocdbt, first))
    return Attempt(
        source=source,
        processes=processes,
        devices=rng.choice([1, 2]),
        budget_gb=rng.choice([0.003, 0.004, 0.006]),
        faults=tuple(faults),
        patient=any(fault.kind == LOSE for fault in faults) or rng.random() < 0.1,
        grace_seconds=rng.uniform(0, 0.5),
    )


def _fault(rng: random.Random, source: str, output: str, processes: int, ocdbt: bool, first: bool) -> Fault:
    impossible = {
        "storm": {source, output} == {LOCAL},
        OUTAGE: {source, output} == {LOCAL},
        EXPIRING: source != HUB,
        DISK_FULL: output != LOCAL,
        READ_ERROR: source != LOCAL,
        SHORT_READS: source != LOCAL,
        LOSE: processes == 1,
    }
    weights = {kind: weight for kind, weight in _KINDS.items() if not impossible.get(kind)}
    (kind,) = rng.choices(list(weights), list(weights.values()))
    if kind in ("storm", OUTAGE):
        return _storm(rng, source, output, ocdbt, first, outage=kind == OUTAGE)
    moment = _moment(rng, ocdbt, first, only=("start", "plan", "read") if kind in (READ_ERROR, EXPIRING) else ())
    # Only the first process merges and commits.
    alone = moment.phase in ("merge", "commit", "summary")
    victims = tuple(rng.sample(range(processes), rng.choice([1, rng.randint(1, processes)])))
    if alone and rng.random() < 0.7:
        victims = (0,)
    if kind in (DISK_FULL, READ_ERROR, SHORT_READS):
        # Counted by the process itself.
        return Fault(kind, Moment(moment.phase, -(-moment.count // processes), 0.0), (0,) if alone else victims[:1])
    if kind == TERMINATE and rng.random() < 0.5:
        victims = tuple(range(processes))
    if kind == EXPIRING:
        return Fault(kind, moment, place=HUB, times=rng.choice([8, 20, 50]))
    return Fault(kind, moment, victims, seconds=rng.uniform(0.1, 2.0))


def _storm(rng: random.Random, source: str, output: str, ocdbt: bool, first: bool, *, outage: bool = False) -> Fault:
    place = rng.choice([place for place in (source, output) if place != LOCAL])
    kind, times = (OUTAGE, _OUTAGE) if outage else (rng.choice(STORMS), rng.choice(_STORM))
    return Fault(kind, _moment(rng, ocdbt, first), place=place, times=times)


def _moment(rng: random.Random, ocdbt: bool, first: bool, only: Sequence[str] = ()) -> Moment:
    weights = {phase: weight for phase, weight in _PHASES.items() if not only or phase in only}
    (phase,) = rng.choices(list(weights), list(weights.values()))
    if phase == "merge" and not ocdbt:
        phase = "commit"
    # Of some three dozen waves most are done when a second attempt begins.
    count = {"read": rng.randint(1, 30 if first else 8), "write": rng.randint(1, 30 if first else 8)}.get(phase, 1)
    if phase == "commit":
        count = rng.randint(1, 2)
    # On a disk, merge and commit take some milliseconds.
    return Moment(phase, count, rng.choice([0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)]))
