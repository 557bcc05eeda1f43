"""The three strengths of `verify`, on one host and on several: what each finds, and what is kept of it."""

import io
import json
import math
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import tiny_models
from etils import epath
from rich.console import Console

from slicecast.convert import commands, orbax_checkpoint, summary, tiles
from slicecast.convert.box import Box
from slicecast.convert.errors import OutputError, ReadError
from slicecast.convert.memory import Machine
from slicecast.convert.plan import Plan
from slicecast.convert.report import files as report_files
from slicecast.convert.settings import Settings
from slicecast.convert.verification import against_source, digests, record, sampling, strengths
from slicecast.convert.verification.against_source import Region
from slicecast.convert.verification.progress import VerifyProgress
from slicecast.convert.verification.record import Verification
from slicecast.convert.verification.strengths import DIGESTS, FULL, SAMPLE, Request

SUMMARY = "slicecast-summary.json"
STRENGTHS = (FULL, SAMPLE, DIGESTS)
EMBEDDING = "params/params/token_embedder/embedding"
EXPERTS = "params/params/decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"

# With tiles this small, leaves are cut along all of their axes.
SMALL_TILES = {"COLUMN": 6000, "MAX_CHUNK": 1000, "REQUEST": 100, "MAX_INNER": 500, "SMALL": 500}

# One process cannot read the source.
FAIL = """
import os
from slicecast.convert.verification import definition
from slicecast.convert.errors import ReadError
def fail(*arguments):
    raise ReadError("model.safetensors: made to fail")
if "--process_id=1" in sys.argv:
    definition.rows = fail
"""


@pytest.fixture(scope="module")
def finished(module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint of `kimi` whose chunks are files. Not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "output"
    flags = ["--checkpoint_storage_use_ocdbt=false", "--host_memory_gb=0.01"]
    module_slicecast.run("convert", f"--hf_model_path={kimi}", f"--base_output_directory={output}", *flags)
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "output"))


def run(output: Path, strength: str = FULL, **fields: Any) -> Verification:
    console = Console(file=io.StringIO())
    return strengths.verify_checkpoint(Request(output=str(output), strength=strength, **fields), console)


def change(output: Path, path: str, change_values: Callable[[Any], Any]) -> None:
    """Changes stored values of a leaf; its chunks are as whole as before."""
    store = {"driver": "zarr3", "kvstore": f"file://{output}/0/items/{path.replace('/', '.')}/"}
    array = ts.open(store, open=True).result()
    array.write(change_values(array.read().result())).result()


def chunks(output: Path, path: str) -> list[Path]:
    """The files of a leaf's chunks."""
    return [file for file in (output / "0" / "items" / path.replace("/", ".") / "c").rglob("*") if file.is_file()]


def negated(values: Any) -> Any:
    return -values


def one_changed(values: Any) -> Any:
    values[(-1,) * values.ndim] += 1
    return values


def reseal(output: Path) -> None:
    """Writes the summary again, so that the files that hold no chunks are as it says."""
    found = summary.read(epath.Path(output))
    for name in found["files"]:
        found["files"][name] = summary.file_digest((output / "0" / name).read_bytes())
    del found["files"], found["digest"]
    (output / "slicecast-summary.json").write_text(summary.encode(found))


# ---- What each finds


@pytest.mark.parametrize("strength", STRENGTHS)
def test_what_is_right(output: Path, strength: str) -> None:
    found = run(output, strength)
    own = orbax_checkpoint.read_own_metadata(epath.Path(output / "0"))
    assert found.wrong == ()
    assert (found.strength, found.checkpoint, found.hosts, found.leaves) == (strength, own["digest"], 1, 32)
    first, second = found.right
    assert first.startswith("32 leaves" if strength != SAMPLE else "")
    assert second == f"{len(summary.read(epath.Path(output))['files'])} files without chunks: as {SUMMARY} says"
    assert record.read(epath.Path(output)) == (found,)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_leaf_that_is_wrong(output: Path, strength: str) -> None:
    change(output, EXPERTS, negated)
    ((path, detail),) = run(output, strength).wrong
    assert path == EXPERTS
    assert detail.startswith("has the digest" if strength == DIGESTS else "")
    assert ("values differ; the first is at [" in detail) is (strength != DIGESTS)


@pytest.mark.parametrize("strength", [FULL, DIGESTS])
@pytest.mark.parametrize("path", [EXPERTS, EMBEDDING])
def test_a_single_value(output: Path, strength: str, path: str) -> None:
    change(output, path, one_changed)
    (found,) = run(output, strength).wrong
    assert found[0] == path
    assert strength == DIGESTS or found[1].startswith("1 values differ")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_missing_leaf(output: Path, strength: str) -> None:
    """Also if all files are as the summary says."""
    file = output / "0" / "items" / "_METADATA"
    tree = json.loads(file.read_text())
    (key,) = [key for key in tree["tree_metadata"] if "token_embedder" in key]
    del tree["tree_metadata"][key]
    file.write_text(json.dumps(tree))
    assert run(output, strength).wrong == (("0/items/_METADATA", "is not as it was written"), (EMBEDDING, "is missing"))
    reseal(output)
    assert run(output, strength).wrong == ((EMBEDDING, "is missing"),)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_missing_chunk(output: Path, strength: str) -> None:
    """A loader reads zeros; also where no region of the sample is."""
    min(chunks(output, EXPERTS)).unlink()
    found = dict(run(output, strength, regions=1, seed=1).wrong)
    assert found.keys() == {EXPERTS}
    assert found[EXPERTS].startswith(f"1 chunks are missing, among them {EXPERTS.replace('/', '.')}/c/0/0/0/0")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_byte_of_a_chunk(output: Path, strength: str) -> None:
    chunk = min(chunks(output, EMBEDDING))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3] ^= 4
    chunk.write_bytes(content)
    ((path, detail),) = run(output, strength, regions=10**6).wrong
    assert path == EMBEDDING
    assert "cannot be read" in detail


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "items/_METADATA", "commit_success.txt"])
def test_a_byte_of_a_file_without_chunks(output: Path, strength: str, name: str) -> None:
    file = output / "0" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = run(output, strength)
    assert (f"0/{name}", "is not as it was written") in found.wrong
    assert found.right == ()
    file.unlink()
    assert (f"0/{name}", "is missing") in run(output, strength).wrong


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_byte_of_the_summary(output: Path, strength: str) -> None:
    file = output / SUMMARY
    file.write_text(file.read_text().replace('"digest": "', '"digest": "0', 1))
    ((path, detail),) = run(output, strength).wrong
    assert path == SUMMARY
    assert detail == "is damaged: it is not what its own digest says"


def test_without_a_summary(output: Path) -> None:
    (output / SUMMARY).unlink()
    with pytest.raises(OutputError, match="Run the command that converted again: it writes one"):
        run(output, DIGESTS)
    assert run(output).right[1] == f"not checked: files without chunks, for there is no {SUMMARY}"


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_summary_of_an_earlier_version(output: Path, strength: str) -> None:
    reseal(output)
    assert run(output, strength).right[1] == f"not checked: files without chunks, of which {SUMMARY} has no digests"


def test_digests_need_no_source(output: Path, tmp_path: Path) -> None:
    """Nor that the checkpoint lies where it was written."""
    moved = Path(shutil.move(output, tmp_path / "moved"))
    assert run(moved, DIGESTS, hf_model_path=str(tmp_path / "gone")).wrong == ()


def test_the_tree_of_a_summary() -> None:
    arrays = {"a": ts.array(np.zeros((2, 3), np.float32)), "b": ts.array(np.zeros(3, np.float32))}
    leaf = {"shape": [2, 3], "dtype": "float32"}
    assert digests.compare_trees({"a": leaf, "b": {"shape": [3], "dtype": "float32"}}, arrays) == []
    found = digests.compare_trees({"a": {**leaf, "dtype": "bfloat16"}, "c": leaf}, arrays)
    assert sorted(map(str, found)) == [
        "a is float32[2, 3], expected bfloat16[2, 3]",
        "b is not expected",
        "c is missing",
    ]


class Failing:
    """An array whose storage fails."""

    def __init__(self, cause: str):
        self._cause = cause

    def __getitem__(self, _: object) -> "Failing":
        return self

    def read(self) -> "Failing":
        """As of an array."""
        return self

    def result(self) -> Any:
        """As of a future."""
        raise ValueError(f"{self._cause}: Error reading 'gs://bucket/a'")


def test_failures_of_storage_are_no_damage() -> None:
    box = Box.whole((2,))
    with pytest.raises(ReadError, match=r"the checkpoint cannot be read: UNAVAILABLE: .*Run the same command again"):
        against_source.read_stored(Failing("UNAVAILABLE"), box)
    with pytest.raises(against_source.DamagedError, match="cannot be read: DATA_LOSS"):
        against_source.read_stored(Failing("DATA_LOSS"), box)


# ---- What is kept


def test_results_are_kept_and_reported(output: Path) -> None:
    kept = [run(output, DIGESTS), run(output, SAMPLE, seed=7)]
    assert record.read(epath.Path(output)) == tuple(kept)
    page = Path(report_files.write_report(epath.Path(output))).read_text()
    assert "✓ Finished and verified" in page
    assert kept[1].right[0] in page
    change(output, EXPERTS, negated)
    assert run(output).wrong
    page = Path(report_files.write_report(epath.Path(output))).read_text()
    assert "✗ Finished, and verify found differences" in page
    assert EXPERTS in page


def test_an_output_that_cannot_be_written(output: Path) -> None:
    """The result is the same, and somebody is told that it is not kept."""
    (output / "slicecast-verification.json").mkdir()
    console = Console(file=io.StringIO(), width=1000)
    found = strengths.verify_checkpoint(Request(output=str(output), strength=DIGESTS), console)
    assert found.wrong == ()
    assert isinstance(console.file, io.StringIO)
    assert f"the result is not kept: {output} cannot be written" in console.file.getvalue()


def test_an_output_that_is_overwritten(slicecast: Any, llama: Path, kimi: Path, tmp_path: Path) -> None:
    """What was found in the checkpoint before says nothing of the new one."""
    arguments = ["convert", f"--base_output_directory={tmp_path}"]
    slicecast.run(*arguments, f"--hf_model_path={kimi}")
    run(tmp_path, DIGESTS)
    report_files.write_report(epath.Path(tmp_path))
    slicecast.run(*arguments, f"--hf_model_path={llama}", "--overwrite")
    assert not (tmp_path / "slicecast-verification.json").exists()
    assert not (tmp_path / "slicecast-report.html").exists()


# ---- The command line


def test_command_line(slicecast: Any, output: Path, kimi: Path) -> None:
    done = slicecast.run("verify", output)
    assert f"source {kimi}, as the checkpoint says" in done.stderr
    assert done.stdout.startswith("32 leaves, ")
    done = slicecast.run("verify", output, "--sample=3", "--seed=5", "--json")
    found = json.loads(done.stdout)
    assert found["strength"] == "sample"
    assert "; --seed=5 compares the same" in found["right"][0]
    assert record.read(epath.Path(output))[-1].right == tuple(found["right"])
    change(output, EXPERTS, negated)
    done = slicecast.run("verify", output, "--digests", "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["wrong"][0][0] == EXPERTS
    assert f"VerificationError: {output}: 1 of 32 leaves differ from their digests:" in done.stderr
    for flags in (["--sample", "--digests"], ["--seed=1"], ["--digests", "--requantize"]):
        assert slicecast.run("verify", output, *flags, check=False).returncode == 2


# ---- Samples


def plan_of(source: Path, **settings: Any) -> Plan:
    return commands.make_plan(Settings(hf_model_path=str(source), **settings), Machine(1, 1, 10**9, None))


def bits(x: Any) -> Any:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize(("name", "scan_layers"), tiny_models.TREES)
def test_regions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, scan_layers: bool) -> None:
    """They lie in their leaves, do not overlap, are of every leaf, and what is expected of them is right."""
    for constant, nbytes in SMALL_TILES.items():
        monkeypatch.setattr(tiles, f"{constant}_BYTES", nbytes)
    monkeypatch.setattr(sampling, "_ROWS_BYTES", 1000)
    plan = plan_of(tiny_models.write(tmp_path, name), scan_layers=scan_layers)
    regions = sampling.draw(plan, 16, 1)
    assert any(region.box != region.rows for region in regions)
    for planned in plan.leaves:
        shape = planned.leaf.shape
        whole = against_source._expected(plan, planned, Box.whole(shape))
        seen = np.zeros(shape, bool)
        mine = [region for region in regions if region.leaf is planned]
        assert mine
        for region in mine:
            box, rows = region.box, region.rows
            assert all(0 <= low < high <= size for low, high, size in zip(box.start, box.stop, shape, strict=True))
            assert not seen[box.slices].any()
            seen[box.slices] = True
            found = against_source._expected(plan, planned, rows)[against_source._inside(box, rows)]
            assert np.array_equal(bits(found), bits(whole[box.slices]))
        assert len(mine) == 16 or seen.all()


def test_a_seed_gives_the_same_regions(kimi: Path) -> None:
    plan = plan_of(kimi)

    def draw(seed: int) -> list[tuple[Any, ...]]:
        return [(region.leaf.leaf.path, region.box) for region in sampling.draw(plan, 4, seed)]

    assert draw(1) == draw(1) != draw(2)


def test_an_unbroken_part_is_always_met(kimi: Path) -> None:
    """One expert of sixteen with twice as many regions, whatever the seed."""
    plan = plan_of(kimi)
    (planned,) = [planned for planned in plan.leaves if planned.leaf.path == EXPERTS]
    experts = planned.leaf.shape[0]
    right = against_source._expected(plan, planned, Box.whole(planned.leaf.shape))
    for seed in range(experts):
        wrong = right.copy()
        wrong[seed] = -wrong[seed]
        regions = [region for region in sampling.draw(plan, 2 * experts, seed) if region.leaf is planned]
        assert against_source.compare_values(plan, {EXPERTS: ts.array(wrong)}, regions, lambda _: None, 10**9)


def test_what_a_sample_of_a_large_model_reads(make_checkpoint: Callable[..., Path]) -> None:
    """Kimi-K2.6 with five of its layers: less than a hundredth of it, a few MB at once."""
    source = make_checkpoint(headers_only=True, files=8, layers=5)
    plan = plan_of(source, host_memory_gb=64)
    regions = sampling.draw(plan, sampling.DEFAULT_REGIONS, 0)
    inner = (math.prod(region.leaf.tiling.inner) * region.leaf.itemsize for region in regions)
    read = sum(region.rows.size * region.leaf.itemsize for region in regions) + sum(inner)
    assert plan.out_bytes > 1e11
    assert read < plan.out_bytes / 100
    assert max(region.memory_bytes for region in regions) < 64 << 20


# ---- Memory


@pytest.mark.parametrize(
    ("family", "dtype"), [("kimi-k2.6", "bfloat16"), ("deepseek-fp8", "float32"), ("llama", "float32")]
)
def test_memory(make_checkpoint: Callable[..., Path], family: str, dtype: str) -> None:
    """No comparison holds more than it is said to, also where all values differ."""
    sizes = {"layers": 2, "hidden": 1024, "intermediate": 2048, "vocab": 2048}
    experts = {"experts": 4, "moe_intermediate": 1024} if family != "llama" else {}
    plan = plan_of(make_checkpoint(family=family, files=1, **sizes, **experts), save_dtype=dtype)
    regions = [region for region in map(Region.of, plan.boxes) if region.nbytes > 1 << 20]
    assert regions
    for region in regions:
        leaf = region.leaf.leaf
        arrays = {leaf.path: ts.array(np.full(leaf.shape, 1.5, leaf.dtype))}
        tracemalloc.start()
        try:
            assert against_source.compare_values(plan, arrays, [region], lambda _: None, 1)
            # What TensorStore has read is not seen there.
            held = tracemalloc.get_traced_memory()[1] + region.nbytes
        finally:
            tracemalloc.stop()
        assert region.memory_bytes / 4 < held <= region.memory_bytes


def test_how_many_at_once() -> None:
    assert against_source.workers([100, 300, 200], 899) == 2
    assert against_source.workers([100], 10) == 1
    assert against_source.workers([1], 10**9) <= 32
    assert against_source.workers([], 10) >= 1


# ---- Several processes


def start(slicecast: Any, output: Path, *flags: object, prelude: str = "", extra: tuple[str, ...] = ()) -> list[Any]:
    """What two processes did that verify together; the second has extra flags."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    cluster = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    runs = [
        slicecast.start(
            "verify", output, *flags, *cluster, f"--process_id={process}", *(extra if process else ()), prelude=prelude
        )
        for process in range(2)
    ]
    return [each.wait() for each in runs]


def leaf_of(source: Path, process: int) -> str:
    """A leaf that one of two processes has for itself."""
    plan = commands.make_plan(Settings(hf_model_path=str(source)), Machine(2, 1, 10**7, None))
    mine, theirs = (
        {work.leaf.leaf.path for wave in plan.waves[number] for work in wave.boxes} for number in (process, 1 - process)
    )
    return min(mine - theirs)


@pytest.mark.parametrize(("strength", "process"), [(FULL, 0), (FULL, 1), (SAMPLE, 1)])
def test_two_processes_find_what_one_has(slicecast: Any, output: Path, kimi: Path, strength: str, process: int) -> None:
    path = leaf_of(kimi, process)
    change(output, path, negated)
    flags = ["--sample=2"] if strength == SAMPLE else []
    first, second = start(slicecast, output, *flags, "--host_memory_gb=0.01", "--json")
    assert (first.returncode, second.returncode) == (1, 1), first.stderr + second.stderr
    assert second.stdout == ""
    found = json.loads(first.stdout)
    assert [wrong[0] for wrong in found["wrong"]] == [path]
    assert found["hosts"] == 2
    assert record.read(epath.Path(output))[-1].wrong[0][0] == path


def test_two_processes_and_digests(slicecast: Any, output: Path) -> None:
    """A leaf's digest needs what both have read."""
    first, second = start(slicecast, output, "--digests")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("32 leaves: each has the digest")
    assert second.stdout == ""


def test_two_processes_that_differ(slicecast: Any, output: Path) -> None:
    first, second = start(slicecast, output, extra=("--sample", "--seed=3"))
    assert (first.returncode, second.returncode) == (2, 2)
    assert "have another request than process 0" in first.stderr


def test_a_process_that_fails(slicecast: Any, output: Path) -> None:
    """Both end, with the same exit code."""
    first, second = start(slicecast, output, prelude="import sys" + FAIL)
    assert (first.returncode, second.returncode) == (42, 42), first.stderr + second.stderr
    assert "process 1: model.safetensors: made to fail" in first.stderr
    assert not (output / "slicecast-verification.json").exists()


@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_shares_of_chunks(output: Path, processes: int) -> None:
    """Each chunk is read once, in order, and by bytes each process has about the same."""
    arrays = orbax_checkpoint.open_arrays(epath.Path(output))
    everything = list(digests.share(arrays, 0, 1))
    shares = [list(digests.share(arrays, process, processes)) for process in range(processes)]
    assert [chunk for share in shares for chunk in share] == everything
    largest = max(chunk.nbytes for chunk in everything)
    total = sum(chunk.nbytes for chunk in everything)
    assert all(abs(sum(chunk.nbytes for chunk in share) - total / processes) <= largest for share in shares)


# ---- While it runs


def test_lines_now_and_then() -> None:
    """Where there is no terminal."""
    file = io.StringIO()
    seconds = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    with VerifyProgress(Console(file=file, width=200), 4 * 10**9, clock=lambda: next(seconds)) as progress:
        for _ in range(4):
            progress.add(10**9)
    assert file.getvalue() == (
        "compared 2.00 of 4.00 GB (0.06 GB/s), 31 s left\ncompared 4.00 of 4.00 GB (0.06 GB/s), 0 s left\n"
    )


def test_a_bar_on_a_terminal() -> None:
    file = io.StringIO()
    with VerifyProgress(Console(file=file, width=120, force_terminal=True), 2 * 10**9) as progress:
        progress.add(10**9)
    assert "50%" in file.getvalue()
