"""Bytes and memory over time, from the log. Pure.

The axis is the time in which a run was alive: the pauses between runs are left out. It is cut into buckets of equal
length. A wave's bytes are spread evenly over the time that its stage took, and the buckets add up to the bytes exactly.

A wave reads and computes its boxes one after another and then writes them together, so the log's durations say when:

    begin                                                          the time of the event
      |------------ read and compute ------------|----- write -----|
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slicecast.convert.pipeline import STAGES
from slicecast.convert.run_log import Event

# Enough to see each wave of a short run, and few enough that the charts of 64 hosts stay below a megabyte.
BUCKETS = 120


@dataclass(frozen=True)
class Segment:
    """One run on the axis.

    Attributes:
        run: Its name.
        start: Where it begins, in seconds on the axis.
        started: When it began, as seconds since 1970.
        seconds: How long it was alive.
    """

    run: str
    start: float
    started: float
    seconds: float

    def position(self, time: float) -> float:
        """Where a moment of the run lies on the axis; the nearest end for one outside."""
        return self.start + min(max(time - self.started, 0.0), self.seconds)


@dataclass(frozen=True)
class HostTimeline:
    """What one host did, bucket by bucket.

    Attributes:
        process: Its number.
        bytes_of: Bytes of each stage: source bytes read, output bytes computed and written.
        memory_bytes: The most memory that was seen; None while no run is known to be alive there.
        limit_bytes: The budget and what the process held before it began; None where the log lacks them.
    """

    process: int
    bytes_of: Mapping[str, tuple[int, ...]]
    memory_bytes: tuple[int | None, ...]
    limit_bytes: tuple[int | None, ...]


@dataclass(frozen=True)
class Timeline:
    """All hosts over all runs.

    Attributes:
        bucket_seconds: The length of a bucket.
        segments: The runs, in order.
        hosts: The hosts, in order.
    """

    bucket_seconds: float
    segments: tuple[Segment, ...]
    hosts: tuple[HostTimeline, ...]

    @property
    def seconds(self) -> float:
        """The length of the axis."""
        return sum(segment.seconds for segment in self.segments)

    def together(self, stage: str) -> tuple[int, ...]:
        """The bytes of a stage on all hosts."""
        return tuple(map(sum, zip(*(host.bytes_of[stage] for host in self.hosts), strict=True)))


def make(events: Sequence[Event], buckets: int = BUCKETS) -> Timeline | None:
    """The timeline of a log; None if nothing in it takes time.

    Args:
        events: All events of all runs.
        buckets: How many buckets there shall be.
    """
    segments = _segments(events)
    seconds = sum(segment.seconds for segment in segments)
    if not seconds:
        return None
    of_run = {segment.run: segment for segment in segments}
    processes = sorted({event["process"] for event in events})
    width = seconds / buckets
    hosts = [
        _host(process, [event for event in events if event["process"] == process], of_run, width, buckets)
        for process in processes
    ]
    return Timeline(width, segments, tuple(hosts))


def _segments(events: Sequence[Event]) -> tuple[Segment, ...]:
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["run"], []).append(event["time"])
    segments: list[Segment] = []
    position = 0.0
    for run, of_run in sorted(times.items(), key=lambda item: min(item[1])):
        segments.append(Segment(run, position, min(of_run), max(of_run) - min(of_run)))
        position += segments[-1].seconds
    return tuple(segments)


def _host(
    process: int, events: Sequence[Event], of_run: Mapping[str, Segment], width: float, buckets: int
) -> HostTimeline:
    bytes_of = {stage: [0] * buckets for stage in STAGES}
    memory: list[int | None] = [None] * buckets
    limit: list[int | None] = [None] * buckets
    for run in dict.fromkeys(event["run"] for event in events):
        segment = of_run[run]
        mine = [event for event in events if event["run"] == run]
        for event in mine:
            for stage, nbytes, start, stop in _work(event):
                _spread(bytes_of[stage], nbytes, segment.position(start) / width, segment.position(stop) / width)
        samples = [
            (_bucket(segment.position(event["time"]) / width, buckets), event["rss_bytes"])
            for event in mine
            if event.get("rss_bytes")
        ]
        last = _bucket(segment.position(max(event["time"] for event in mine)) / width, buckets)
        _hold(memory, samples, last)
        limits = [limit_bytes(event) for event in mine if event["event"] == "begin"]
        if samples and limits and limits[0] is not None:
            _hold(limit, [(samples[0][0], limits[0])], last)
    return HostTimeline(
        process, {stage: tuple(found) for stage, found in bytes_of.items()}, tuple(memory), tuple(limit)
    )


def limit_bytes(begin: Event) -> int | None:
    """The memory that a process may hold: its budget, over what it held before the work began; from its first event."""
    budget, base = begin.get("host_budget_bytes"), begin.get("rss_bytes")
    return budget + base if budget and base else None


def _work(event: Event) -> list[tuple[str, int, float, float]]:
    """What a wave did: stage, bytes, and from when to when."""
    seconds = event.get("seconds") or {}
    if event["event"] != "wave" or not seconds:
        return []
    read, compute, write = (seconds.get(stage, 0.0) for stage in STAGES)
    computed = event["time"] - write
    began = computed - read - compute
    return [
        ("read", event.get("in_bytes", 0), began, computed),
        ("compute", event.get("written_bytes", 0), began, computed),
        ("write", event.get("written_bytes", 0), computed, event["time"]),
    ]


def _spread(found: list[int], nbytes: int, start: float, stop: float) -> None:
    """Adds bytes to the buckets between two positions, in proportion to the time in each; not one is lost to rounding.

    Positions are in buckets.
    """
    first, last = _bucket(start, len(found)), _bucket(stop, len(found))
    given = 0
    for bucket in range(first, last):
        until = int(nbytes * (bucket + 1 - start) / (stop - start))
        found[bucket] += until - given
        given = until
    found[last] += nbytes - given


def _hold(found: list[int | None], samples: Sequence[tuple[int, int]], last: int) -> None:
    """Puts samples into their buckets, the largest of each, and holds the newest until the next one."""
    held = 0
    newest = dict(samples)
    largest: dict[int, int] = {}
    for bucket, value in samples:
        largest[bucket] = max(value, largest.get(bucket, 0))
    for bucket in range(min(newest, default=last + 1), last + 1):
        value = max(held, largest[bucket]) if bucket in largest else held
        found[bucket] = max(value, found[bucket] or 0)
        held = newest.get(bucket, held)


def _bucket(position: float, buckets: int) -> int:
    return min(int(position), buckets - 1)
