"""What a report consists of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slicecast.convert.pipeline import STAGES
from slicecast.convert.report.timeline import Timeline
from slicecast.convert.verification.record import Verification


@dataclass(frozen=True)
class ReportedLeaf:
    """An array of the checkpoint.

    Attributes:
        path: Where it stands in the tree.
        shape: Its shape.
        dtype: Its dtype.
        nbytes: Its size before compression.
        digest: The digest of its values; None while the checkpoint is not finished.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    digest: str | None


@dataclass(frozen=True)
class ReportedRun:
    """One start of `convert`.

    Attributes:
        name: The run's name.
        started: When, as seconds since 1970.
        seconds: From its first event to its last.
        hosts: How many hosts took part.
        waves: Waves that it wrote.
        found: Waves that it found written.
        in_bytes: Source bytes read.
        written_bytes: Output bytes written, before compression.
        ending: How it ended.
        perhaps_alive: Whether it may still run: it is the last one, and some host has not said that it ended.
    """

    name: str
    started: float
    seconds: float
    hosts: int
    waves: int
    found: int
    in_bytes: int
    written_bytes: int
    ending: str
    perhaps_alive: bool = False


@dataclass(frozen=True)
class ReportedHost:
    """What a process did in all runs.

    Attributes:
        process: Its number.
        name: The machine that it ran on last; "" if unknown.
        in_bytes: Source bytes read.
        written_bytes: Output bytes written, before compression.
        seconds: How long it was alive.
        stage_seconds: What its workers spent in each stage.
        peak_bytes: The most memory that it held.
        budget_bytes: The budget for bytes in flight, of its last run; None if unknown.
        limit_bytes: The budget and what the process held before it began; None if unknown.
    """

    process: int
    name: str
    in_bytes: int
    written_bytes: int
    seconds: float
    stage_seconds: Mapping[str, float]
    peak_bytes: int
    budget_bytes: int | None
    limit_bytes: int | None


@dataclass(frozen=True)
class Stage:
    """What all workers of all hosts did in one stage.

    Attributes:
        name: `read`, `compute` or `write`; `other` for the rest of the workers' time.
        seconds: Time of workers.
        share: The part of the workers' time.
        nbytes: What went through; None for `other`.
    """

    name: str
    seconds: float
    share: float
    nbytes: int | None


@dataclass(frozen=True)
class Ignored:
    """Source tensors that were left out for one reason."""

    why: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """Everything that the page says.

    Attributes:
        output: Where the checkpoint lies.
        finished: Whether it is finished.
        finished_at: When it was, as seconds since 1970; None if it is not, or nobody wrote it down.
        looked: When the report was made.
        source: What was converted.
        model: What it is.
        quantization: How the source is quantized.
        versions: The versions of the libraries that wrote it.
        settings: The flags that say what the result is.
        plan: The digest of the plan.
        in_bytes: Source bytes that the plan reads.
        out_bytes: Output bytes before compression.
        done_bytes: Those that are known to be written.
        requests: Read requests, as far as runs came to tell.
        devices: Devices of each host, in the last run; None if unknown.
        runs: The runs, in order.
        hosts: The hosts, in order.
        stages: The stages and the rest; empty where the log lacks them.
        timeline: Bytes and memory over time; None without a log.
        leaves: The arrays, largest first.
        formats: How many source tensors each codec decoded.
        ignored: What was left out and why.
        notes: What the model's rules want to be known.
        warnings: What runs warned of.
        verifications: What `verify` found in this checkpoint, newest first.
    """

    output: str
    finished: bool
    finished_at: float | None
    looked: float
    source: str
    model: str
    quantization: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    plan: str
    in_bytes: int
    out_bytes: int
    done_bytes: int
    requests: int | None
    devices: int | None
    runs: tuple[ReportedRun, ...]
    hosts: tuple[ReportedHost, ...]
    stages: tuple[Stage, ...]
    timeline: Timeline | None
    leaves: tuple[ReportedLeaf, ...]
    formats: Mapping[str, int]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    verifications: tuple[Verification, ...]

    @property
    def seconds(self) -> float:
        """How long runs were alive, one after another."""
        return sum(run.seconds for run in self.runs)

    @property
    def unlogged_bytes(self) -> int:
        """Output that is written, but of which no log tells: its host was killed before it wrote that down."""
        return max(0, self.done_bytes - sum(host.written_bytes for host in self.hosts))

    @property
    def interruptions(self) -> int:
        """How many runs ended before the checkpoint was finished."""
        if not self.runs:
            return 0
        return len(self.runs) - (self.finished or self.runs[-1].perhaps_alive)

    @property
    def bottleneck(self) -> Stage | None:
        """The stage that took most of the workers' time."""
        return max((s for s in self.stages if s.name in STAGES), key=lambda stage: stage.seconds, default=None)
