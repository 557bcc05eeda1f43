"""The report as a page: one HTML file that needs nothing else, not even a script. Pure."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import jinja2
from markupsafe import Markup

from slicecast.convert.memory import GB
from slicecast.convert.pipeline import STAGES
from slicecast.convert.report import charts
from slicecast.convert.report.charts import Axis, Frame
from slicecast.convert.report.records import Report, ReportedHost
from slicecast.convert.report.timeline import HostTimeline, Timeline

# Heights in pixels: of a chart over the whole page, and of one in a row of a table.
_TALL, _SMALL = 84, 30

# Room above the highest line, so that the label at the upper edge stands clear of it.
_HEADROOM = 1.2

# A budget so far above what was used would press the lines to the ground; it is then only named.
_FARTHEST_LIMIT = 3.0

_WHAT = {
    "read": "source bytes, by ranges",
    "compute": "decoding and laying out, on the devices; counted in bytes of output",
    "write": "compressing and storing; counted in bytes before compression",
    "other": "nothing to do: looking for what is there, waiting for memory or other hosts, begin and end",
}


@dataclass(frozen=True)
class Panel:
    """A chart over the whole page, and what is said beside it.

    Attributes:
        name: What it shows.
        facts: Figures in words.
        chart: The drawing.
    """

    name: str
    facts: tuple[str, ...]
    chart: Markup


@dataclass(frozen=True)
class HostRow:
    """A row of the table of hosts.

    Attributes:
        host: The figures.
        charts: Its small charts: each stage, and memory; empty without a log.
        within: Whether it kept to the budget; None if that is unknown.
    """

    host: ReportedHost
    charts: tuple[Markup, ...]
    within: bool | None


def render(report: Report) -> str:
    """The page."""
    text = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            panels=_panels(report),
            hosts=_host_rows(report),
            pauses=_pauses(report),
            stages=STAGES,
            what=_WHAT,
            dtypes=_dtypes(report),
        )
    )
    # A name in a JSON file may hold half of a surrogate pair, which no encoding of text has.
    return text.encode("utf-8", "backslashreplace").decode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slicecast.convert.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size,
        "rate": rate,
        "duration": duration,
        "moment": moment,
        "percent": percent,
        "count": count,
    }
    environment.globals |= {"bar": charts.bar}
    return environment


def _panels(report: Report) -> list[Panel]:
    timeline = report.timeline
    if timeline is None:
        return []
    axis = _axis(timeline)
    panels = []
    for stage in STAGES:
        rates = [nbytes / timeline.bucket_seconds for nbytes in timeline.together(stage)]
        top = charts.round_top(max(rates))
        mean = sum(timeline.together(stage)) / timeline.seconds
        facts = (f"{rate(mean)} on average", f"{rate(max(rates))} at most")
        title = f"{stage}, all hosts together, over {duration(timeline.seconds)}: {', '.join(facts)}"
        panels.append(Panel(stage, facts, charts.area(rates, axis, Frame(title, _TALL, top, rate(top)), stage)))
    return [*panels, _memory_panel(report, timeline, axis)]


def _memory_panel(report: Report, timeline: Timeline, axis: Axis) -> Panel:
    top = charts.round_top(_HEADROOM * _memory_top(timeline.hosts))
    highest = max(report.hosts, key=lambda host: host.peak_bytes)
    facts = [f"{size(highest.peak_bytes)} at most (host {highest.process})"]
    if highest.budget_bytes is not None and highest.limit_bytes is not None:
        before = size(highest.limit_bytes - highest.budget_bytes)
        facts.append(f"budget {size(highest.budget_bytes)}, over {before} held before")
        if highest.limit_bytes > top:
            facts.append("the budget is above the chart")
    title = f"memory of each of {len(report.hosts)} hosts, over {duration(timeline.seconds)}: {', '.join(facts)}"
    limits = max((host.limit_bytes for host in timeline.hosts), key=lambda each: max(v or 0 for v in each))
    drawn = charts.lines(
        [host.memory_bytes for host in timeline.hosts], limits, axis, Frame(title, _TALL, top, size(top), times=True)
    )
    return Panel("memory", tuple(facts), drawn)


def _memory_top(hosts: Sequence[HostTimeline]) -> float:
    used = max([1] + [value for host in hosts for value in host.memory_bytes if value is not None])
    limit = max([0] + [value for host in hosts for value in host.limit_bytes if value is not None])
    return max(used, limit if limit <= _FARTHEST_LIMIT * used else 0)


def _host_rows(report: Report) -> list[HostRow]:
    timeline = report.timeline
    drawn = _small_charts(timeline) if timeline else {}
    return [
        HostRow(
            host,
            drawn.get(host.process, ()),
            None if host.limit_bytes is None else host.peak_bytes <= host.limit_bytes,
        )
        for host in report.hosts
    ]


def _small_charts(timeline: Timeline) -> dict[int, tuple[Markup, ...]]:
    """The charts of each host. All hosts have the same scale, so that a slow one is seen."""
    axis = _axis(timeline)
    tops = {stage: max(max(host.bytes_of[stage]) for host in timeline.hosts) or 1 for stage in STAGES}
    memory_top = _memory_top(timeline.hosts)
    return {
        host.process: (
            *(
                charts.area(
                    host.bytes_of[stage], axis, Frame(f"{stage}, host {host.process}", _SMALL, tops[stage]), stage
                )
                for stage in STAGES
            ),
            charts.lines(
                [host.memory_bytes],
                host.limit_bytes,
                axis,
                Frame(f"memory, host {host.process}", _SMALL, memory_top),
            ),
        )
        for host in timeline.hosts
    }


def _axis(timeline: Timeline) -> Axis:
    return Axis(timeline.seconds, tuple(segment.start for segment in timeline.segments[1:]))


def _pauses(report: Report) -> list[float]:
    """How long nothing ran before each run but the first."""
    return [
        max(0.0, following.started - before.started - before.seconds)
        for before, following in zip(report.runs, report.runs[1:], strict=False)
    ]


def _dtypes(report: Report) -> list[tuple[str, int, int]]:
    """Each dtype of the output: how many leaves have it, and their bytes; most bytes first."""
    found: dict[str, list[int]] = {}
    for leaf in report.leaves:
        found.setdefault(leaf.dtype, []).append(leaf.nbytes)
    return sorted(((dtype, len(sizes), sum(sizes)) for dtype, sizes in found.items()), key=lambda row: -row[2])


def size(nbytes: float) -> str:
    """A size in the unit in which it is a small number."""
    for unit, factor in (("TB", 1000 * GB), ("GB", GB), ("MB", 10**6), ("kB", 1000)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{0 if nbytes >= 100 * factor else 1 if nbytes >= 10 * factor else 2}f} {unit}"
    return f"{nbytes:.0f} B"


def rate(bytes_per_second: float) -> str:
    """A throughput."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """A time, as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def moment(time: float) -> str:
    """A point in time, the same for all readers."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def percent(share: float) -> str:
    """A share; never 100 for less than all."""
    return f"{int(100 * share)} %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def count(number: int) -> str:
    """A number with its thousands apart."""
    return f"{number:,}"
