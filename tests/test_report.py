"""`slicecast report`: what it finds in the log is exact, and its page is whole, alone and harmless."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert.errors import OutputError
from slicecast.convert.pipeline import STAGES
from slicecast.convert.report import charts, data, files, page, timeline
from slicecast.convert.report.records import Ignored, Report
from slicecast.convert.verification import record
from slicecast.convert.verification.record import Verification

MB = 10**6

# Reads fail after some of the work, as if the disk did.
FAIL = """
from slicecast.convert import pipeline
from slicecast.convert.errors import ReadError
class Failing(pipeline.Reader):
    def read(self, wanted):
        if self.requests > 40:
            raise ReadError("model-00002-of-00003.safetensors: made to fail")
        return super().read(wanted)
pipeline.Reader = Failing
"""

FACTS: dict[str, Any] = {
    "source": "/data/model",
    "model": "Model: 2 layers",
    "quantization": "not quantized",
    "formats": {"bfloat16": 7, "float32": 1},
    "notes": ["a note"],
    "ignored": [{"why": "no place for it", "tensors": 3, "bytes": 4000}],
    "plan": "ab" * 32,
    "in_bytes": 300,
    "out_bytes": 400,
    "leaves": {
        "params/small": {"shape": [10], "dtype": "float32"},
        "params/large": {"shape": [3, 4, 15], "dtype": "bfloat16"},
    },
}
METADATA = {"scan_layers": True, "slicecast": {"version": "9", "digest": "checkpoint", "save_dtype": "bfloat16"}}


# ---- Logs that are made up


def begin(run: str, process: int, time: float, **fields: Any) -> dict[str, Any]:
    known = {"waves_in_flight": 2, "host_budget_bytes": 1000, "rss_bytes": 100, "devices": 4}
    facts = {"facts": FACTS, "metadata": METADATA} if process == 0 else {}
    return {
        "event": "begin",
        "run": run,
        "process": process,
        "time": time,
        "host": "vm",
        "versions": {"slicecast": "9"},
        **known,
        **facts,
        **fields,
    }


def wave(run: str, process: int, time: float, seconds: tuple[float, float, float], **fields: Any) -> dict[str, Any]:
    known = {"in_bytes": 60, "written_bytes": 80, "rss_bytes": 300, "peak_rss_bytes": 350}
    stages = dict(zip(STAGES, seconds, strict=True))
    return {"event": "wave", "run": run, "process": process, "time": time, "seconds": stages, **known, **fields}


def event(name: str, run: str, process: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": name, "run": run, "process": process, "time": time, **fields}


# Two hosts. The first run is stopped after ten seconds, host 1 says nothing; the second finishes 90 seconds later.
LOG = (
    begin("first", 0, 1000.0),
    begin("first", 1, 1000.0),
    wave("first", 0, 1010.0, (4.0, 2.0, 4.0)),
    event("end", "first", 0, 1010.0, error="PreemptedError: ended by SIGTERM", requests=5),
    begin("second", 0, 1100.0),
    begin("second", 1, 1100.0, host_budget_bytes=500),
    wave("second", 0, 1101.0, (0.0, 0.0, 0.0), in_bytes=0, written_bytes=0, resumed=True),
    wave("second", 1, 1110.0, (1.0, 0.0, 1.0), in_bytes=240, written_bytes=320, rss_bytes=700, peak_rss_bytes=900),
    event("end", "second", 0, 1101.0, error=None, requests=0),
    event("end", "second", 1, 1110.0, error=None, requests=7),
    event("commit", "second", 0, 1110.0),
    event("commit", "second", 1, 1110.0),
)


def evidence(**fields: Any) -> data.Evidence:
    found = data.Evidence(
        output="/out", finished=False, events=LOG, summary={}, metadata={}, verifications=(), looked=2000.0
    )
    return dataclasses.replace(found, **fields)


def extracted(**fields: Any) -> Report:
    report = data.extract(evidence(**fields))
    assert report is not None
    return report


def finished(**fields: Any) -> Report:
    leaves = {path: {**leaf, "digest": f"{i:032x}"} for i, (path, leaf) in enumerate(FACTS["leaves"].items())}
    summary = {**FACTS, "leaves": leaves, "versions": {"slicecast": "9"}, "finished": 1111.0}
    return extracted(**{"finished": True, "summary": summary, "metadata": METADATA, **fields})


# ---- The timeline


def test_a_waves_bytes_lie_where_its_stages_were() -> None:
    made = timeline.make([begin("r", 0, 100.0), wave("r", 0, 110.0, (4.0, 2.0, 4.0))], buckets=10)
    assert made is not None
    (host,) = made.hosts
    assert made.bucket_seconds == 1.0
    assert host.bytes_of["read"] == (10,) * 6 + (0,) * 4
    assert host.bytes_of["compute"] == (13, 13, 14, 13, 13, 14, 0, 0, 0, 0)
    assert host.bytes_of["write"] == (0,) * 6 + (20,) * 4
    assert host.memory_bytes == (100,) * 9 + (300,)
    assert host.limit_bytes == (1100,) * 10


def test_the_pause_between_runs_is_left_out() -> None:
    made = timeline.make(LOG, buckets=20)
    assert made is not None
    assert made.seconds == 20.0
    assert [(segment.run, segment.start, segment.started) for segment in made.segments] == [
        ("first", 0.0, 1000.0),
        ("second", 10.0, 1100.0),
    ]
    first, second = made.hosts
    assert first.bytes_of["write"] == (0,) * 6 + (20,) * 4 + (0,) * 10
    assert second.bytes_of["read"] == (0,) * 18 + (240, 0)
    assert second.bytes_of["write"] == (0,) * 19 + (320,)
    assert made.together("write") == tuple(map(sum, zip(*(host.bytes_of["write"] for host in made.hosts), strict=True)))
    # Nothing is known of host 1 between its first and only word in the first run and the second run.
    assert second.memory_bytes == (100,) + (None,) * 9 + (100,) * 9 + (700,)
    assert second.limit_bytes == (1100,) + (None,) * 9 + (600,) * 10


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.floats(0, 1e6),
            st.tuples(*[st.floats(0, 1e5)] * 3),
            st.integers(0, 10**13),
            st.integers(0, 10**13),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 200),
)
def test_buckets_add_up_to_the_bytes(waves: list[Any], buckets: int) -> None:
    events = [
        wave("r", process, time, seconds, in_bytes=read, written_bytes=written)
        for process, time, seconds, read, written in waves
    ]
    made = timeline.make([begin("r", 0, 0.0), *events, event("end", "r", 0, 1e6 + 1)], buckets)
    assert made is not None
    for host in made.hosts:
        mine = [of_wave for of_wave in waves if of_wave[0] == host.process]
        assert sum(host.bytes_of["read"]) == sum(of_wave[3] for of_wave in mine)
        assert sum(host.bytes_of["write"]) == sum(host.bytes_of["compute"]) == sum(of_wave[4] for of_wave in mine)
        assert all(min(host.bytes_of[stage]) >= 0 for stage in STAGES)


def test_the_highest_memory_of_a_bucket_is_kept() -> None:
    samples = [wave("r", 0, 10.0 + i / 10, (0.0, 0.0, 0.1), rss_bytes=rss) for i, rss in enumerate((5, 900, 7))]
    made = timeline.make([begin("r", 0, 0.0), *samples, event("end", "r", 0, 20.0)], buckets=2)
    assert made is not None
    assert made.hosts[0].memory_bytes == (100, 900)


def test_no_time_is_no_timeline() -> None:
    assert timeline.make([]) is None
    assert timeline.make([begin("r", 0, 5.0)]) is None


# ---- What happened


def test_a_resumed_run() -> None:
    report = finished()
    assert [(run.name, run.seconds, run.hosts, run.waves, run.found) for run in report.runs] == [
        ("first", 10.0, 2, 1, 0),
        ("second", 10.0, 2, 1, 1),
    ]
    assert report.runs[0].ending == "PreemptedError: ended by SIGTERM (host 0); no last word of host 1"
    assert report.runs[1].ending == "finished the checkpoint"
    assert (report.interruptions, report.seconds, report.requests, report.devices) == (1, 20.0, 12, 4)
    assert report.finished_at == 1110.0
    assert [(host.in_bytes, host.written_bytes, host.peak_bytes) for host in report.hosts] == [
        (60, 80, 350),
        (240, 320, 900),
    ]
    assert [(host.budget_bytes, host.limit_bytes) for host in report.hosts] == [(1000, 1100), (500, 600)]
    assert report.unlogged_bytes == 0


def test_the_order_of_the_files_does_not_matter() -> None:
    """Their names begin with that of the run, which is chance."""
    assert finished(events=LOG[4:] + LOG[:4]) == finished()


def test_the_workers_time_is_divided() -> None:
    report = finished()
    # Two workers on each host; host 0 was alive for 10 seconds in each run, host 1 in the second.
    assert [(stage.name, stage.seconds, stage.nbytes) for stage in report.stages] == [
        ("read", 5.0, 300),
        ("compute", 2.0, 400),
        ("write", 5.0, 400),
        ("other", 48.0, None),
    ]
    assert sum(stage.share for stage in report.stages) == pytest.approx(1.0)
    assert report.bottleneck == report.stages[0]


def test_leaves_are_in_the_order_of_their_sizes() -> None:
    assert [(leaf.path, leaf.nbytes, leaf.digest) for leaf in finished().leaves] == [
        ("params/large", 360, f"{1:032x}"),
        ("params/small", 40, f"{0:032x}"),
    ]
    assert {leaf.digest for leaf in extracted().leaves} == {None}


def test_an_unfinished_checkpoint_says_how_far_it_is() -> None:
    report = extracted(events=LOG[:4])
    assert (report.done_bytes, report.out_bytes, report.finished_at) == (80, 400, None)
    assert report.model == FACTS["model"]
    assert report.settings == {"scan_layers": True, "save_dtype": "bfloat16"}
    assert report.ignored == (Ignored("no place for it", 3, 4000),)
    assert report.interruptions == 1
    text = page.render(report)
    assert "Not finished: 20 % is known to be written" in text
    assert "ended by SIGTERM" in text


@pytest.mark.parametrize(
    ("events", "ending", "interruptions"),
    [
        (LOG[:3], "still running, or killed: no last word of any host", 0),
        (
            (*LOG[:3], event("end", "first", 0, 1010.0, error=None)),
            "still running, or killed: no last word of host 1",
            0,
        ),
        (
            (*LOG[:3], *(event("end", "first", process, 1010.0, error=None) for process in (0, 1))),
            "wrote all, but the checkpoint was not committed",
            1,
        ),
    ],
)
def test_the_last_run_of_an_unfinished_checkpoint(events: Any, ending: str, interruptions: int) -> None:
    report = extracted(events=tuple(events))
    assert report.runs[-1].ending == ending
    assert report.interruptions == interruptions


def test_an_earlier_run_without_last_words_was_killed() -> None:
    assert finished(events=LOG[:3] + LOG[4:]).runs[0].ending == "killed: no last word of any host"


def test_bytes_of_which_no_log_tells() -> None:
    assert finished(events=LOG[3:]).unlogged_bytes == 80
    assert "80 B of the output are in no log" in page.render(finished(events=LOG[3:]))


def test_without_a_log() -> None:
    """A checkpoint that was copied from the Hub has its summary alone."""
    host = {"process": 0, "in_bytes": 300, "written_bytes": 400, "seconds": 7.5, "peak_rss_bytes": 900}
    runs = [{"run": "r", "started": 1000.0, "seconds": 7.5, "hosts": [host]}]
    summary = {**FACTS, "versions": {"slicecast": "9"}, "finished": 1111.0, "runs": runs}
    report = extracted(finished=True, events=(), summary=summary, metadata=METADATA)
    assert report.timeline is None
    assert report.stages == ()
    assert [(run.seconds, run.in_bytes, run.written_bytes) for run in report.runs] == [(7.5, 300, 400)]
    assert report.hosts[0].peak_bytes == 900
    text = page.render(report)
    assert "There is no log here" in text
    assert "Finished, not verified yet" in text


def test_a_summary_and_a_log_of_an_earlier_version() -> None:
    """They lack what reports were made for."""
    lacking = ("formats", "notes", "ignored", "finished")
    summary = {name: value for name, value in FACTS.items() if name not in lacking} | {"versions": {"slicecast": "0"}}
    kept = ("event", "run", "process", "time", "waves", "out_bytes", "versions")
    events = [{name: found[name] for name in kept if name in found} for found in LOG if found["event"] == "begin"]
    waves = [found for found in LOG if found["event"] == "wave"]
    report = extracted(finished=True, summary=summary, events=(*events, *waves))
    assert [host.limit_bytes for host in report.hosts] == [None, None]
    assert report.stages[-1].seconds == 0.0
    assert "not known" in page.render(report)


def test_nothing_to_report_on(tmp_path: Path) -> None:
    assert data.extract(evidence(events=())) is None
    with pytest.raises(OutputError, match="there is neither"):
        files.write_report(epath.Path(tmp_path))


def test_a_torn_log(tmp_path: Path) -> None:
    """A process was killed while it wrote; and a line is no event."""
    log = tmp_path / "slicecast-log"
    log.mkdir()
    whole = json.dumps(LOG[0]) + "\n5\n" + json.dumps(LOG[2]) + "\n"
    (log / "first-0-0.jsonl").write_text(whole + json.dumps(LOG[3])[:40])
    (log / "first-1-0.jsonl").write_text("")
    (log / "notes.txt").write_text("not ours")
    found = files.find_evidence(epath.Path(tmp_path))
    assert found.events == (LOG[0], LOG[2])
    written = files.write_report(epath.Path(tmp_path))
    assert written == str(tmp_path / "slicecast-report.html")
    assert "still running, or killed" in Path(written).read_text()


def test_a_damaged_summary(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "slicecast-summary.json").write_text("{")
    with pytest.raises(OutputError, match="no report can be made of what is there"):
        files.write_report(epath.Path(tmp_path))
    (tmp_path / "slicecast-summary.json").write_text("[]")
    with pytest.raises(OutputError, match="this is no summary of a conversion"):
        files.write_report(epath.Path(tmp_path))


# ---- Verifications


RIGHT = Verification("full", "checkpoint", "9", 1500.0, 12.5, 2, 2, ("2 leaves: all equal",))
WRONG = Verification("sample", "checkpoint", "9", 1600.0, 1.0, 1, 2, (), (("params/large", "5 values differ"),))


def test_verifications_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    output = epath.Path(tmp_path)
    assert record.read(output) == ()
    record.add(output, RIGHT)
    record.add(output, WRONG)
    assert record.read(output) == (RIGHT, WRONG)
    (tmp_path / record.VERIFICATION_FILE).write_text("{")
    assert record.read(output) == ()


def test_verifications_of_another_checkpoint_do_not_count() -> None:
    replaced = dataclasses.replace(RIGHT, finished=1000.0)
    other = dataclasses.replace(RIGHT, checkpoint="other")
    assert finished(verifications=(replaced, other)).verifications == ()
    assert finished(verifications=(RIGHT, WRONG)).verifications == (WRONG, RIGHT)


def test_the_page_says_what_verify_found() -> None:
    right = page.render(finished(verifications=(RIGHT,)))
    assert "✓ Finished and verified" in right
    assert "every value with the source" in right
    assert "2 leaves: all equal" in right
    wrong = page.render(finished(verifications=(RIGHT, WRONG)))
    assert "✗ Finished, and verify found differences" in wrong
    assert "5 values differ" in wrong


# ---- Charts


def test_an_area_is_steps() -> None:
    svg = charts.area([0.0, 5.0, 5.0, 10.0], charts.Axis(4.0), charts.Frame("words", 50, 10.0), "read")
    assert 'd="M0 100H250V50H750V0H1000"' in svg
    assert 'd="M0 100L0 100H250V50H750V0H1000L1000 100Z"' in svg
    assert 'aria-label="words"' in svg


def test_lines_have_gaps() -> None:
    values = [None, 5, 5, None, 2.5, None]
    svg = charts.lines([values], [20] * 6, charts.Axis(6.0), charts.Frame("words", 50, 10.0))
    assert 'd="M166.7 50H500M666.7 75H833.3"' in svg
    assert '<path d="" class="limit line"' in svg, "a limit above the chart is not drawn"


@pytest.mark.parametrize(
    ("seconds", "last"), [(0.4, "0:00"), (26.2, "0:25"), (60.0, "1:00"), (3600.0, "1 h 00"), (10**6, "168 h 00")]
)
def test_ticks_are_round_and_few(seconds: float, last: str) -> None:
    ticks = charts.Axis(seconds).ticks
    assert len(ticks) <= 7
    assert charts.clock(ticks[-1]) == last


@pytest.mark.parametrize(("value", "top"), [(0, 1.0), (1.0, 1.0), (1.01, 1.2), (273 * MB, 300 * MB), (9.99, 10.0)])
def test_the_upper_edge_is_round(value: float, top: float) -> None:
    assert charts.round_top(value) == pytest.approx(top)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (page.size(999), "999 B"),
        (page.size(4200), "4.20 kB"),
        (page.size(16.25 * 10**9), "16.2 GB"),
        (page.size(555 * 10**9), "555 GB"),
        (page.rate(1.5 * MB), "1.50 MB/s"),
        (page.duration(59.94), "59.9 s"),
        (page.duration(61), "1 min 01 s"),
        (page.duration(7260), "2 h 01 min"),
        (page.duration(90000), "1 d 01 h"),
        (page.moment(0), "1970-01-01 00:00:00 UTC"),
        (page.percent(0.9999), "99 %"),
        (page.percent(1.0), "100 %"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected


# ---- The page


class Page(HTMLParser):
    """A page, which must be well-formed.

    Attributes:
        tags: Its tags, with their attributes.
        texts: Its texts, in order.
    """

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a tag."""
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes note of a tag without content."""
        # As browsers understand it: only in SVG does the slash close a tag.
        assert "svg" in self._open
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closes the tag that was opened last."""
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        """Takes note of a text."""
        self.texts.append(text)


PAGES: Mapping[str, Callable[[], Report]] = {
    "finished": lambda: finished(verifications=(RIGHT, WRONG)),
    "not verified": finished,
    "unfinished": lambda: extracted(events=LOG[:4]),
    "just begun": lambda: extracted(events=LOG[:1]),
    "no leaves": lambda: finished(summary={**FACTS, "leaves": {}, "out_bytes": 0, "versions": {}}),
}


@pytest.mark.parametrize("kind", PAGES)
def test_the_page_is_whole_and_alone(kind: str) -> None:
    text = page.render(PAGES[kind]())
    found = Page(text)
    tags = {tag for tag, _ in found.tags}
    assert {"html", "title", "h1", "h2"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "use", "image"})
    for _, attributes in found.tags:
        assert attributes.keys().isdisjoint({"src", "href", "xlink:href", "style", "srcset", "action"})
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_chart_has_words_and_figures_beside_it() -> None:
    found = Page(page.render(finished()))
    drawings = [attributes for tag, attributes in found.tags if tag == "svg" and attributes.get("class")]
    assert len(drawings) == len(STAGES) + 1 + len(finished().stages) + 2 * (len(STAGES) + 1) + 2
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    words = "\n".join(str(attributes["aria-label"]) for attributes in drawings)
    assert "read, all hosts together, over 20.0 s: 15 B/s on average" in words
    headings = [attributes for tag, attributes in found.tags if tag == "th"]
    assert all(attributes.get("scope") in ("row", "col") for attributes in headings)


HOSTILE = "</code></script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{ 7 * 7 }} \ud800 \u202e"
SHOWN = HOSTILE.replace("\ud800", "\\ud800")


def test_names_are_harmless() -> None:
    """Wherever a name or a message comes from outside, the page shows it as it is."""
    facts = {
        **FACTS,
        "source": HOSTILE,
        "model": HOSTILE,
        "quantization": HOSTILE,
        "formats": {HOSTILE: 1},
        "notes": [HOSTILE],
        "ignored": [{"why": HOSTILE, "tensors": 1, "bytes": 1}],
        "plan": HOSTILE,
        "leaves": {HOSTILE: {"shape": [2], "dtype": "bfloat16", "digest": HOSTILE}},
        "versions": {HOSTILE: HOSTILE},
        "finished": 1111.0,
    }
    events = tuple({**found, "host": HOSTILE} for found in LOG) + (
        event("warning", "second", 0, 1102.0, message=HOSTILE),
    )
    metadata = {"slicecast": {**METADATA["slicecast"], HOSTILE: HOSTILE}}  # type: ignore[dict-item]
    results = (
        dataclasses.replace(RIGHT, strength=HOSTILE, right=(HOSTILE,)),
        dataclasses.replace(WRONG, wrong=((HOSTILE, HOSTILE),)),
    )
    text = page.render(finished(output=HOSTILE, summary=facts, metadata=metadata, events=events, verifications=results))
    found = Page(text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "img"})
    assert "".join(found.texts).count(SHOWN) >= 15
    assert "49" not in "".join(t for t in found.texts if "alert" in t)


def test_many_hosts_stay_small() -> None:
    """64 hosts, with thousands of waves."""
    events = [begin("r", process, 0.0) for process in range(64)]
    events += [wave("r", process, 10.0 + i, (2.0, 1.0, 3.0)) for process in range(64) for i in range(50)]
    text = page.render(extracted(events=tuple(events)))
    Page(text)
    assert len(text) < 10**6


# ---- Through the command line


@pytest.fixture(scope="module")
def interrupted(module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A conversion that fails, and is then finished: its output, and the page after each."""
    output = tmp_path_factory.mktemp("report") / "out"
    command = (
        "convert",
        f"--hf_model_path={kimi}",
        f"--base_output_directory={output}",
        "--host_memory_gb=0.01",
        "--simulated_cpu_devices_count=2",
    )
    assert module_slicecast.run(*command, prelude=FAIL, check=False).returncode != 0
    done = module_slicecast.run("report", output)
    assert done.stdout == f"{output}/slicecast-report.html\n"
    unfinished = (output / "slicecast-report.html").read_text()
    module_slicecast.run(*command)
    module_slicecast.run("report", output)
    return output, unfinished, (output / "slicecast-report.html").read_text()


def test_the_page_of_a_run_that_failed(interrupted: tuple[Path, str, str]) -> None:
    _, text, _ = interrupted
    words = " ".join("".join(Page(text).texts).split())
    assert re.search(r"Not finished: \d+ % is known to be written", words)
    assert "ReadError: model-00002-of-00003.safetensors: made to fail (host 0)" in words
    assert "KimiK25ForConditionalGeneration" in words
    assert "the vision tower is left out" in words


def test_the_page_of_the_run_that_finished(interrupted: tuple[Path, str, str], kimi: Path) -> None:
    output, _, text = interrupted
    found = Page(text)
    words = " ".join("".join(found.texts).split())
    summary = json.loads((output / "slicecast-summary.json").read_text())
    assert "Finished, not verified yet" in words
    assert "It was interrupted once" in words
    assert "Converted on 1 host with 2 devices each" in words
    for path, leaf in summary["leaves"].items():
        assert path in found.texts
        assert leaf["digest"] in found.texts
    for name in summary["formats"]:
        assert name in found.texts
    assert f"slicecast verify {output} --hf_model_path={kimi}" in words


def test_the_log_accounts_for_every_byte(interrupted: tuple[Path, str, str]) -> None:
    output, _, _ = interrupted
    report = data.extract(files.find_evidence(epath.Path(output)))
    assert report is not None
    assert report.timeline is not None
    assert sum(report.timeline.together("write")) == sum(run.written_bytes for run in report.runs) == report.out_bytes
    assert sum(report.timeline.together("read")) == sum(run.in_bytes for run in report.runs) == report.in_bytes
    assert report.unlogged_bytes == 0
    assert [run.ending for run in report.runs][1] == "finished the checkpoint"
    assert report.runs[1].found > 0
    (host,) = report.hosts
    assert host.budget_bytes == 10 * MB
    assert host.limit_bytes is not None
    assert host.limit_bytes > 10 * MB


def test_the_page_goes_where_it_is_told(slicecast: Any, interrupted: tuple[Path, str, str], tmp_path: Path) -> None:
    output, _, _ = interrupted
    target = tmp_path / "page.html"
    done = slicecast.run("report", output, f"--html={target}")
    assert done.stdout == f"{target}\n"
    Page(target.read_text())


def test_nothing_there(slicecast: Any, tmp_path: Path) -> None:
    done = slicecast.run("report", tmp_path, check=False)
    assert done.returncode == OutputError.exit_code
    assert "Give the --base_output_directory of a conversion." in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket() -> Iterator[BucketServer]:
    """A running stand-in with a bucket."""
    running = BucketServer("bucket")
    yield running
    running.close()


def test_in_a_bucket(slicecast: Any, interrupted: tuple[Path, str, str], bucket: BucketServer, tmp_path: Path) -> None:
    output, _, text = interrupted
    kept = [*(output / "slicecast-log").iterdir(), output / "slicecast-summary.json", output / "0/_CHECKPOINT_METADATA"]
    for file in kept:
        bucket.upload("bucket", f"out/{file.relative_to(output)}", file.read_bytes())
    bucket.upload("bucket", "out/0/commit_success.txt", b"committed")
    done = slicecast.start("report", "gs://bucket/out", environment=bucket.environment).wait()
    assert done.stdout == "gs://bucket/out/slicecast-report.html\n", done.stderr
    assert any(method == "POST" and "slicecast-report.html" in path for method, path, *_ in bucket.log())
    target = tmp_path / "page.html"
    slicecast.start("report", "gs://bucket/out", f"--html={target}", environment=bucket.environment).wait()

    def without_place_and_time(page: str, place: object) -> str:
        return re.sub(r"Made [^.]*", "", page.replace(str(place), "OUT"))

    assert without_place_and_time(target.read_text(), "gs://bucket/out") == without_place_and_time(text, output)
