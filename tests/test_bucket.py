"""Conversions from and to buckets, against a stand-in on loopback that TensorStore and gcsfs speak to."""

import itertools
import json
import re
import subprocess
import sys
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from bucket_server import BucketServer

from slicecast.convert import commands
from slicecast.convert.errors import UsageError
from slicecast.convert.memory import Machine
from slicecast.convert.settings import Settings
from slicecast.convert.source.reader import plan_requests
from slicecast.convert.source.storage import open_storage

# Two dozen waves a process, which would be committed within a second.
BUDGET_BYTES = 3_000_000

SOURCE = "gs://bucket/source"


@pytest.fixture(scope="module")
def buckets() -> Iterator[BucketServer]:
    """A running stand-in with a bucket."""
    running = BucketServer("bucket")
    yield running
    running.close()


def upload(buckets: BucketServer, directory: Path, path: str) -> None:
    """Copies the files of a directory into the bucket."""
    for file in directory.iterdir():
        buckets.upload("bucket", f"{path}/{file.name}", file.read_bytes())


def run(slicecast: Any, buckets: BucketServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = slicecast.start(*arguments, environment=buckets.environment).wait()
    return done


@dataclass(frozen=True)
class Requested:
    """A request to the bucket for an object."""

    method: str
    name: str
    byte_range: str
    time: float


def requests(log: list[list[Any]]) -> list[Requested]:
    """The requests for objects, in order; those of lists of objects left out."""
    found = []
    for method, path, byte_range, _, time in log:
        parts = urllib.parse.urlsplit(path)
        named = re.search(r"/o/([^/]+)", parts.path)
        name = urllib.parse.unquote(named[1]) if named else urllib.parse.parse_qs(parts.query).get("name", [""])[0]
        if name:
            found.append(Requested(method, name, byte_range, time))
    return found


@pytest.fixture(scope="module", params=["ocdbt", "files"])
def converted(
    request: pytest.FixtureRequest, module_slicecast: Any, buckets: BucketServer, kimi: Path
) -> tuple[str, list[Requested], list[list[dict[str, Any]]]]:
    """A conversion from bucket to bucket by two processes: its output's path, its requests, each process's events."""
    upload(buckets, kimi, "source")
    output = f"out-{request.param}"
    before = len(buckets.log())
    done = module_slicecast.run_processes(
        f"--hf_model_path={SOURCE}",
        f"--base_output_directory=gs://bucket/{output}",
        f"--host_memory_gb={BUDGET_BYTES / 1e9}",
        f"--checkpoint_storage_use_ocdbt={request.param == 'ocdbt'}",
        "--log_json",
        environments={process: buckets.environment for process in range(2)},
    )
    events = [[json.loads(line) for line in one.stderr.splitlines() if line.startswith("{")] for one in done]
    return output, requests(buckets.log()[before:]), events


def test_the_result_is_right(slicecast: Any, buckets: BucketServer, kimi: Path, converted: Any) -> None:
    output, _, _ = converted
    for source in (SOURCE, kimi):
        done = run(slicecast, buckets, "verify", f"gs://bucket/{output}", f"--hf_model_path={source}")
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr


def test_ranges_are_joined(kimi: Path, converted: Any) -> None:
    """Each tensor of weights is read once, by one request, and nothing else but headers and samples is."""
    _, log, _ = converted
    plan = commands.make_plan(Settings(hf_model_path=str(kimi)), Machine(2, 4, BUDGET_BYTES, None))
    expected: list[tuple[str, str]] = []
    for work in plan.boxes:
        start, stop = work.leaf.rows(work.box)
        tensors = work.leaf.tensors(work.box)
        spans = [span for tensor in tensors for part in tensor.parts for span in part.spans(start, stop)]
        expected += [
            (found.file, f"bytes={found.offset}-{found.offset + found.nbytes - 1}") for found in plan_requests(spans)
        ]
    reads = [
        (request.name.removeprefix("source/"), request.byte_range)
        for request in log
        if request.method == "GET" and request.name.startswith("source/model") and request.byte_range
    ]
    assert sorted(expected) == sorted(read for read in reads if read in set(expected))
    parts = {part for leaf in plan.leaves for tensor in leaf.sources.values() for part in tensor.parts}
    assert len(expected) == len(parts)


def test_the_commit_comes_last(converted: Any) -> None:
    output, log, _ = converted
    written = [request.name for request in log if request.method == "POST"]
    checkpoint = [name for name in written if name.startswith(f"{output}/0/")]
    commit = f"{output}/0/commit_success.txt"
    first = checkpoint.index(commit)
    assert set(checkpoint[first:]) == {commit}
    assert f"{output}/0/items/commit_success.txt" in checkpoint[:first]
    assert written[-1] == f"{output}/slicecast-summary.json"
    assert log[-1] == Requested("DELETE", f"{output}/slicecast-run", "", log[-1].time)


def test_an_object_is_written_once_a_second_at_most(converted: Any) -> None:
    """A bucket answers 429 to more. Small objects of Orbax and ours are written seldom anyhow."""
    output, log, _ = converted
    times: dict[str, list[float]] = defaultdict(list)
    for request in log:
        if request.method == "POST" and request.name.startswith(f"{output}/0/items/") and "commit" not in request.name:
            times[request.name].append(request.time)
    manifests = {name: written for name, written in times.items() if name.endswith("manifest.ocdbt")}
    chunks = {name: written for name, written in times.items() if name not in manifests and "_METADATA" not in name}
    assert all(len(written) == 1 for written in chunks.values())
    for written in manifests.values():
        # The clock of the stand-in runs when a request has come, which may be a little later for the first of two.
        assert all(after - before > 0.9 for before, after in itertools.pairwise(written))
    if "ocdbt" in output:
        assert max(map(len, manifests.values())) > 2


def test_each_process_tells_of_its_waves(kimi: Path, converted: Any) -> None:
    _, _, events = converted
    plan = commands.make_plan(Settings(hf_model_path=str(kimi)), Machine(2, 4, BUDGET_BYTES, None))
    for process, (of_process, waves) in enumerate(zip(events, plan.waves, strict=True)):
        told = [event for event in of_process if event["event"] == "wave"]
        assert sorted(event["wave"] for event in told) == list(range(len(waves)))
        assert {event["process"] for event in told} == {process}
        assert sum(event["in_bytes"] for event in told) == sum(wave.in_bytes for wave in waves)
        assert sum(event["written_bytes"] for event in told) == sum(wave.out_bytes for wave in waves)


def test_an_unfinished_checkpoint_is_not_loaded_and_goes_on(slicecast: Any, buckets: BucketServer, kimi: Path) -> None:
    """The bucket refuses the last write of all, as if the run had ended before it."""
    upload(buckets, kimi, "source")
    arguments = ["convert", f"--hf_model_path={SOURCE}", "--base_output_directory=gs://bucket/late"]
    buckets.faults(forbidden=1000, only=r"POST .*late.*commit_success")
    done = run(slicecast, buckets, *arguments)
    assert done.returncode == 42
    assert "Traceback" not in done.stderr
    done = run(slicecast, buckets, "verify", "gs://bucket/late", f"--hf_model_path={kimi}")
    assert "an unfinished one: run convert again to finish it" in done.stderr
    buckets.faults()
    done = run(slicecast, buckets, *arguments)
    assert ": 0 waves written, " in done.stderr
    done = run(slicecast, buckets, "verify", "gs://bucket/late", f"--hf_model_path={kimi}")
    assert "all equal to the source, bit for bit" in done.stdout, done.stderr


def test_overwrite(slicecast: Any, buckets: BucketServer, kimi: Path, tmp_path: Path) -> None:
    other = tiny_models.write(tmp_path / "other", "llama")
    to = "--base_output_directory=gs://bucket/replaced"
    assert run(slicecast, buckets, "convert", f"--hf_model_path={other}", to).returncode == 0
    done = run(slicecast, buckets, "convert", f"--hf_model_path={kimi}", to)
    assert "there is a finished checkpoint of another source" in done.stderr
    assert run(slicecast, buckets, "convert", f"--hf_model_path={kimi}", to, "--overwrite").returncode == 0
    done = run(slicecast, buckets, "verify", "gs://bucket/replaced", f"--hf_model_path={kimi}")
    assert "all equal to the source, bit for bit" in done.stdout, done.stderr


@pytest.mark.parametrize("url", ["gs://bucket/nothing", "gs://other/models/tiny"])
def test_buckets_and_paths_that_are_not_there(slicecast: Any, buckets: BucketServer, url: str) -> None:
    done = run(slicecast, buckets, "plan", f"--hf_model_path={url}")
    assert done.returncode == 1
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_bucket_that_is_not_there(slicecast: Any, buckets: BucketServer, kimi: Path) -> None:
    arguments = [f"--hf_model_path={kimi}", "--base_output_directory=gs://other/out"]
    done = run(slicecast, buckets, "convert", *arguments)
    assert done.returncode == 1
    assert "slicecast: OutputError: gs://other/out: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("url", "package", "extra"), [("gs://b/x", "gcsfs", "gcs"), ("s3://b/x", "s3fs", "s3")])
def test_a_package_that_is_not_installed(url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError) as raised:
        open_storage(url)
    assert str(raised.value) == f"{url}: {package} is not installed. Run `pip install 'slicecast[{extra}]'`."
