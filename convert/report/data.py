"""What a report says, from what lies beside a checkpoint. Pure."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  Makes NumPy know bfloat16.
import numpy as np

from slicecast.convert.pipeline import STAGES
from slicecast.convert.report import timeline
from slicecast.convert.report.records import Ignored, Report, ReportedHost, ReportedLeaf, ReportedRun, Stage
from slicecast.convert.run_log import Event
from slicecast.convert.verification.record import Verification

# Settings that the metadata has beside those of `convert`.
_NOT_SETTINGS = ("version", "plan", "digest", "source")

_FINISHED = "finished the checkpoint"


@dataclass(frozen=True)
class Evidence:
    """What was found at an output.

    Attributes:
        output: Where.
        finished: Whether the checkpoint is finished.
        events: All events of all runs, as far as they were written.
        summary: The summary of a finished checkpoint; empty where there is none.
        metadata: The custom metadata of a finished checkpoint; empty where there is none.
        verifications: What `verify` found.
        looked: When, as seconds since 1970.
    """

    output: str
    finished: bool
    events: tuple[Event, ...]
    summary: Mapping[str, Any]
    metadata: Mapping[str, Any]
    verifications: tuple[Verification, ...]
    looked: float


def extract(evidence: Evidence) -> Report | None:
    """The report on what was found; None if nothing says what was converted."""
    # Runs have names by chance, so the order of their files says nothing.
    events = sorted(evidence.events, key=lambda event: float(event["time"]))
    begins = [event for event in events if event["event"] == "begin"]
    told = [event for event in begins if event.get("facts")]
    facts = evidence.summary or (told[-1]["facts"] if told else {})
    if not facts:
        return None
    metadata = evidence.metadata or (told[-1].get("metadata", {}) if told else {})
    own = metadata.get("slicecast", {})
    settings = {name: value for name, value in own.items() if name not in _NOT_SETTINGS and value is not None}
    runs = _runs(events, finished=evidence.finished) or _summarized_runs(evidence.summary)
    hosts = _hosts(events) or _summarized_hosts(evidence.summary)
    written = sum(host.written_bytes for host in hosts)
    finished_at = evidence.summary.get("finished")
    return Report(
        output=evidence.output,
        finished=evidence.finished,
        finished_at=max(_times(events, "commit"), default=finished_at),
        looked=evidence.looked,
        source=facts["source"],
        model=facts["model"],
        quantization=facts["quantization"],
        versions=evidence.summary.get("versions") or (begins[-1]["versions"] if begins else {}),
        settings={**({"scan_layers": metadata["scan_layers"]} if "scan_layers" in metadata else {}), **settings},
        plan=facts["plan"],
        in_bytes=facts["in_bytes"],
        out_bytes=facts["out_bytes"],
        done_bytes=facts["out_bytes"] if evidence.finished else min(written, facts["out_bytes"]),
        requests=sum(event["requests"] for event in events if "requests" in event) or None,
        devices=begins[-1].get("devices") if begins else None,
        runs=runs,
        hosts=hosts,
        stages=_stages(hosts, events),
        timeline=timeline.make(events),
        leaves=_leaves(facts.get("leaves", {})),
        formats=facts.get("formats", {}),
        ignored=tuple(Ignored(i["why"], i["tensors"], i["bytes"]) for i in facts.get("ignored", ())),
        notes=tuple(facts.get("notes", ())),
        warnings=tuple(dict.fromkeys(event["message"] for event in events if event["event"] == "warning")),
        verifications=tuple(
            found
            for found in sorted(evidence.verifications, key=lambda each: -each.finished)
            # What was found in a checkpoint that --overwrite has replaced says nothing of this one.
            if found.checkpoint == own.get("digest") and found.finished >= (finished_at or 0.0)
        ),
    )


def _times(events: Iterable[Event], name: str) -> list[float]:
    return [event["time"] for event in events if event["event"] == name]


def _leaves(leaves: Mapping[str, Mapping[str, Any]]) -> tuple[ReportedLeaf, ...]:
    found = [
        ReportedLeaf(
            path,
            tuple(leaf["shape"]),
            leaf["dtype"],
            int(np.prod(leaf["shape"], dtype=np.int64)) * np.dtype(leaf["dtype"]).itemsize,
            leaf.get("digest"),
        )
        for path, leaf in leaves.items()
    ]
    return tuple(sorted(found, key=lambda leaf: (-leaf.nbytes, leaf.path)))


def _grouped(events: Iterable[Event], field: str) -> dict[Any, list[Event]]:
    found: dict[Any, list[Event]] = {}
    for event in events:
        found.setdefault(event[field], []).append(event)
    return found


def _runs(events: Sequence[Event], *, finished: bool) -> tuple[ReportedRun, ...]:
    of_runs = sorted(_grouped(events, "run").items(), key=lambda item: min(event["time"] for event in item[1]))
    runs = []
    for number, (name, mine) in enumerate(of_runs):
        waves = [event for event in mine if event["event"] == "wave"]
        times = [event["time"] for event in mine]
        found = sum(bool(event.get("resumed")) for event in waves)
        is_last = number == len(of_runs) - 1
        finished_it = is_last and finished
        ends = [event for event in mine if event["event"] == "end"]
        hosts = len({event["process"] for event in mine})
        perhaps_alive = is_last and not finished and len(ends) < hosts and not any(end.get("error") for end in ends)
        runs.append(
            ReportedRun(
                name=name,
                started=min(times),
                seconds=max(times) - min(times),
                hosts=hosts,
                waves=len(waves) - found,
                found=found,
                in_bytes=_sum(mine, "in_bytes"),
                written_bytes=_sum(mine, "written_bytes"),
                ending=_FINISHED if finished_it else _ending(mine, perhaps_alive=perhaps_alive),
                perhaps_alive=perhaps_alive,
            )
        )
    return tuple(runs)


def _ending(events: Sequence[Event], *, perhaps_alive: bool) -> str:
    """How a run ended that did not finish the checkpoint, from the last words of its hosts."""
    ends = {event["process"]: event for event in events if event["event"] == "end"}
    processes = sorted({event["process"] for event in events})
    silent = [process for process in processes if process not in ends]
    whose = "any host" if len(silent) == len(processes) else f"host {', '.join(map(str, silent))}"
    # The first to fail is the cause: the others are ended by that.
    for end in sorted(ends.values(), key=lambda end: float(end["time"])):
        if end.get("error"):
            return f"{end['error']} (host {end['process']})" + (f"; no last word of {whose}" if silent else "")
    if not silent:
        return "wrote all, but the checkpoint was not committed"
    return f"{'still running, or killed' if perhaps_alive else 'killed'}: no last word of {whose}"


def _sum(events: Iterable[Event], field: str) -> int:
    return sum(event.get(field, 0) for event in events if event["event"] == "wave")


def _hosts(events: Sequence[Event]) -> tuple[ReportedHost, ...]:
    hosts = []
    for process, mine in sorted(_grouped(events, "process").items()):
        begin = [event for event in mine if event["event"] == "begin"]
        spent = [event.get("seconds", {}) for event in mine if event["event"] == "wave"]
        hosts.append(
            ReportedHost(
                process=process,
                name=begin[-1].get("host", "") if begin else "",
                in_bytes=_sum(mine, "in_bytes"),
                written_bytes=_sum(mine, "written_bytes"),
                seconds=sum(_alive(of_run) for of_run in _grouped(mine, "run").values()),
                stage_seconds={stage: sum(of_wave.get(stage, 0.0) for of_wave in spent) for stage in STAGES},
                peak_bytes=max(event.get("peak_rss_bytes", event.get("rss_bytes", 0)) for event in mine),
                budget_bytes=begin[-1].get("host_budget_bytes") if begin else None,
                limit_bytes=timeline.limit_bytes(begin[-1]) if begin else None,
            )
        )
    return tuple(hosts)


def _alive(events: Sequence[Event]) -> float:
    times = [event["time"] for event in events]
    return float(max(times) - min(times))


def _stages(hosts: Sequence[ReportedHost], events: Sequence[Event]) -> tuple[Stage, ...]:
    seconds = {stage: sum(host.stage_seconds.get(stage, 0.0) for host in hosts) for stage in STAGES}
    busy = sum(seconds.values())
    if not busy:
        return ()
    read, written = (_sum(events, field) for field in ("in_bytes", "written_bytes"))
    nbytes = {"read": read, "compute": written, "write": written}
    workers = sum(
        _alive(of_process) * next((event.get("waves_in_flight", 0) for event in of_process), 0)
        for of_run in _grouped(events, "run").values()
        for of_process in _grouped(of_run, "process").values()
    )
    total = max(busy, workers)
    stages = [Stage(stage, seconds[stage], seconds[stage] / total, nbytes[stage]) for stage in STAGES]
    return (*stages, Stage("other", total - busy, (total - busy) / total, None))


def _summarized_runs(summary: Mapping[str, Any]) -> tuple[ReportedRun, ...]:
    """The runs as the summary has them, for a checkpoint that was copied without its log."""
    runs = summary.get("runs", ())
    return tuple(
        ReportedRun(
            name=run["run"],
            started=run["started"],
            seconds=run["seconds"],
            hosts=len(run["hosts"]),
            waves=0,
            found=0,
            in_bytes=sum(host["in_bytes"] for host in run["hosts"]),
            written_bytes=sum(host["written_bytes"] for host in run["hosts"]),
            ending=_FINISHED if number == len(runs) else "did not finish the checkpoint",
        )
        for number, run in enumerate(runs, 1)
    )


def _summarized_hosts(summary: Mapping[str, Any]) -> tuple[ReportedHost, ...]:
    of_process: dict[int, list[Mapping[str, Any]]] = {}
    for host in itertools.chain.from_iterable(run["hosts"] for run in summary.get("runs", ())):
        of_process.setdefault(host["process"], []).append(host)
    return tuple(
        ReportedHost(
            process=process,
            name="",
            in_bytes=sum(host["in_bytes"] for host in mine),
            written_bytes=sum(host["written_bytes"] for host in mine),
            seconds=sum(host["seconds"] for host in mine),
            stage_seconds={},
            peak_bytes=max(host["peak_rss_bytes"] for host in mine),
            budget_bytes=None,
            limit_bytes=None,
        )
        for process, mine in sorted(of_process.items())
    )
