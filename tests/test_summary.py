"""The summary of a checkpoint: digests that anybody can compute again, and what each host did in each run."""

import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import xxhash
from etils import epath
from test_interruption import IN_THE_WAVES, SIGNAL
from test_output import KILL

from slicecast.convert import commands
from slicecast.convert.chunk_store import ArraySpec, ChunkFormat, ChunkReader
from slicecast.convert.memory import Machine
from slicecast.convert.plan import Plan
from slicecast.convert.settings import Settings
from slicecast.convert.summary import encode, leaf_digest, read, versions

# By the names that tests have; whether chunks are in OCDBT databases, and whether they are zarr3's.
FORMATS = {
    "ocdbt-zarr3": (True, True),
    "ocdbt-zarr2": (True, False),
    "files-zarr3": (False, True),
    "files-zarr2": (False, False),
}

# With tiles this small, leaves have several chunks, along several axes.
SMALL_TILES = """
from slicecast.convert import tiles
tiles.COLUMN_BYTES, tiles.MAX_CHUNK_BYTES, tiles.MAX_INNER_BYTES = 1 << 15, 1 << 16, 1 << 15
tiles.REQUEST_BYTES, tiles.SMALL_BYTES = 1 << 12, 1 << 14
"""
BUDGET = "--host_memory_gb=0.002"


class Converted(NamedTuple):
    """A finished checkpoint.

    Attributes:
        arguments: The command that made it.
        output: Its output directory. Not to be changed.
        ocdbt: Whether its chunks are in OCDBT databases.
        zarr3: Whether they are those of zarr3.
    """

    arguments: list[str]
    output: Path
    ocdbt: bool
    zarr3: bool


@pytest.fixture(scope="module", params=FORMATS)
def converted(
    request: pytest.FixtureRequest, module_slicecast: Any, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    """The tiny Llama in each format."""
    output = tmp_path_factory.mktemp("converted") / "output"
    ocdbt, zarr3 = FORMATS[request.param]
    flags = [f"--checkpoint_storage_use_ocdbt={ocdbt}", f"--checkpoint_storage_use_zarr3={zarr3}"]
    arguments = command(llama, output, *flags)
    module_slicecast.run(*arguments, prelude=SMALL_TILES)
    return Converted(arguments, output, ocdbt, zarr3)


@pytest.fixture(scope="module")
def leaves_by_default(module_slicecast: Any, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the summary says of the leaves in the default format."""
    output = tmp_path_factory.mktemp("by-default") / "output"
    module_slicecast.run(*command(llama, output), prelude=SMALL_TILES)
    return summary(output)["leaves"]


def command(source: Path, output: Path, *flags: str) -> list[str]:
    return ["convert", f"--hf_model_path={source}", f"--base_output_directory={output}", BUDGET, *flags]


def plan(source: Path) -> Plan:
    return commands.make_plan(Settings(hf_model_path=str(source)), Machine(1, 1, 10**9, None))


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "slicecast-summary.json").read_text())
    return found


def lasting(output: Path) -> dict[str, Any]:
    """What a summary says, whenever it was written."""
    return {key: value for key, value in summary(output).items() if key not in ("finished", "digest")}


def hosts(output: Path) -> list[dict[str, Any]]:
    """What each host did in each run, in order."""
    return [host for run in summary(output)["runs"] for host in run["hosts"]]


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a nested dict with their paths."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from flat(child, f"{prefix}/{key}".lstrip("/"))
    else:
        yield prefix, np.asarray(tree)


def chunk_shape(output: Path, path: str, ocdbt: bool, zarr3: bool) -> list[int]:
    """The shape of an array's chunks, as its metadata says it."""
    items = output / "0" / "items"
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{items}/"} if ocdbt else f"file://{items}/").result()
    name = path.replace("/", ".")
    found = json.loads(store.read(f"{name}/{'zarr.json' if zarr3 else '.zarray'}").result().value)
    shape: list[int] = found["chunk_grid"]["configuration"]["chunk_shape"] if zarr3 else found["chunks"]
    return shape


def expected_leaves(output: Path, ocdbt: bool = True, zarr3: bool = True) -> dict[str, Any]:
    """What a summary should say of the leaves: nothing but what Orbax reads, and the metadata of the arrays."""
    leaves = {}
    for path, array in flat(ocp.StandardCheckpointer().restore(output / "0" / "items")):
        chunk = chunk_shape(output, path, ocdbt, zarr3)
        starts = itertools.product(*(range(0, size, step) for size, step in zip(array.shape, chunk, strict=True)))
        digests = b""
        for start in starts:
            region = tuple(slice(begin, begin + step) for begin, step in zip(start, chunk, strict=True))
            digests += xxhash.xxh3_128_digest(array[region].tobytes())
        leaves[path] = {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "digest": xxhash.xxh3_128_hexdigest(digests),
        }
    return leaves


def test_leaves(converted: Converted, leaves_by_default: Any) -> None:
    """The digests can be computed again from what Orbax reads, and are the same in every format."""
    _, output, ocdbt, zarr3 = converted
    leaves = summary(output)["leaves"]
    assert leaves == expected_leaves(output, ocdbt, zarr3)
    assert any(chunk_shape(output, path, ocdbt, zarr3) < leaf["shape"] for path, leaf in leaves.items())
    assert leaves == leaves_by_default


def test_what_it_is_and_how_it_came_about(converted: Converted, llama: Path) -> None:
    found = summary(converted.output)
    expected = plan(llama)
    metadata = json.loads((converted.output / "0" / "_CHECKPOINT_METADATA").read_text())
    assert found["source"] == str(llama)
    assert found["model"] == expected.model.description
    assert found["quantization"] == "not quantized"
    assert found["plan"] == metadata["custom_metadata"]["slicecast"]["plan"]
    assert found["versions"] == versions()
    assert (found["in_bytes"], found["out_bytes"]) == (expected.in_bytes, expected.out_bytes)
    (run,) = found["runs"]
    (host,) = run["hosts"]
    assert 0 < host["seconds"] <= run["seconds"] < 120
    assert host["peak_rss_bytes"] > 50e6
    assert (host["process"], host["in_bytes"], host["written_bytes"]) == (0, expected.in_bytes, expected.out_bytes)


def test_the_same_command_writes_a_lost_one(slicecast: Any, converted: Converted, tmp_path: Path) -> None:
    """As where the run was killed after the commit; with the log, and without."""
    expected = lasting(converted.output)
    arguments = [word.replace(str(converted.output), str(tmp_path)) for word in converted.arguments]
    shutil.copytree(converted.output, tmp_path, dirs_exist_ok=True)
    (tmp_path / "slicecast-summary.json").unlink()
    slicecast.run(*arguments, prelude=SMALL_TILES)
    assert lasting(tmp_path) == expected
    (tmp_path / "slicecast-summary.json").unlink()
    shutil.rmtree(tmp_path / "slicecast-log")
    slicecast.run(*arguments, prelude=SMALL_TILES)
    assert lasting(tmp_path) == {**expected, "runs": []}
    assert not (tmp_path / "slicecast-run").exists()


def test_digests_that_differ_are_computed(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """Two runs may have written a chunk, on different hardware; only storage knows which of them is there."""
    slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES)
    expected = summary(tmp_path)["leaves"]
    log = tmp_path / "slicecast-log"
    events = [json.loads(line) for part in log.iterdir() for line in part.read_text().splitlines()]
    wrong = {key: "00" * 16 for event in events for key in event.get("digests", ())}
    assert len(wrong) > len(expected)
    event = {"event": "wave", "time": 1.0, "run": "0000", "process": 0, "digests": wrong}
    (log / "0000-0-0.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "slicecast-summary.json").unlink()
    slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES)
    assert summary(tmp_path)["leaves"] == expected
    assert [run["run"] for run in summary(tmp_path)["runs"]] == ["0000", events[0]["run"]]


def test_files_without_chunks(converted: Converted) -> None:
    """Each has the digest of its bytes; the others are chunks, or lie in databases, which have checksums."""
    step = converted.output / "0"
    digests = summary(converted.output)["files"]
    found = {str(path.relative_to(step)): path for path in step.rglob("*") if path.is_file()}
    assert digests == {name: xxhash.xxh3_128_hexdigest(found[name].read_bytes()) for name in digests}
    rest = found.keys() - digests.keys()
    assert {"_CHECKPOINT_METADATA", "items/_METADATA"} <= digests.keys()
    if converted.ocdbt:
        assert all(path.parent.name == "d" for name, path in found.items() if name in rest)
    else:
        assert len(rest) > len(summary(converted.output)["leaves"])
        assert not any(name.endswith(("/zarr.json", "/.zarray")) for name in rest)


def test_a_summary_that_was_changed(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """Whatever byte it is: also where JSON means the same."""
    slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES)
    file = tmp_path / "slicecast-summary.json"
    right = file.read_bytes()
    found = read(epath.Path(tmp_path))
    for place in range(0, len(right), 3):
        file.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
        with pytest.raises(ValueError):
            read(epath.Path(tmp_path))
    file.write_bytes(right + b" ")
    with pytest.raises(ValueError, match="not as it was written"):
        read(epath.Path(tmp_path))
    found["in_bytes"] += 1
    file.write_text(encode(found))
    with pytest.raises(ValueError, match="its own digest"):
        read(epath.Path(tmp_path))


def test_the_summary_of_an_earlier_version(converted: Converted, tmp_path: Path) -> None:
    """It had neither digests of files nor one of its own."""
    found = summary(converted.output)
    del found["files"], found["digest"]
    (tmp_path / "slicecast-summary.json").write_text(encode(found))
    assert read(epath.Path(tmp_path)) == found


class NoReader(ChunkReader):
    """Fails if anything is read."""

    def __init__(self) -> None:
        pass

    def open(self, name: str) -> ts.TensorStore:
        """Not to be called."""
        raise AssertionError(f"{name}: it is read")


def known_digests(spec: ArraySpec, chunk_format: ChunkFormat) -> dict[str, str]:
    return {key: xxhash.xxh3_128_hexdigest(key.encode()) for key in chunk_format.keys(spec)}


@pytest.mark.parametrize("chunk_format", [ChunkFormat(*flags) for flags in FORMATS.values()], ids=FORMATS)
def test_known_digests_are_not_computed(chunk_format: ChunkFormat) -> None:
    """A large checkpoint is not read again for its summary."""
    spec = ArraySpec("a", (4, 6), "bfloat16", (2, 2), (2, 2))
    known = known_digests(spec, chunk_format)
    in_order = b"".join(bytes.fromhex(known[key]) for key in chunk_format.keys(spec))
    assert len(known) == 6
    assert leaf_digest(spec, chunk_format, known, NoReader()) == xxhash.xxh3_128_hexdigest(in_order)
    del known[next(reversed(known))]
    with pytest.raises(AssertionError, match="it is read"):
        leaf_digest(spec, chunk_format, known, NoReader())


def test_killed_before_the_log_was_written(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """The digests that nobody knows are computed."""
    done = slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES + KILL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not any('"digests"' in part.read_text() for part in (tmp_path / "slicecast-log").iterdir())
    slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES)
    killed, last = hosts(tmp_path)
    assert killed["written_bytes"] == 0
    assert 0 < last["written_bytes"] < plan(llama).out_bytes
    assert summary(tmp_path)["leaves"] == expected_leaves(tmp_path)


def test_runs_that_went_on(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """Each is listed, in order; together they did all the work once."""
    for _ in range(2):
        done = slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES + SIGNAL + IN_THE_WAVES, check=False)
        assert done.returncode == 143, done.stderr
    slicecast.run(*command(llama, tmp_path), prelude=SMALL_TILES)
    runs = summary(tmp_path)["runs"]
    assert len(runs) == len({run["run"] for run in runs}) == 3
    assert [run["started"] for run in runs] == sorted(run["started"] for run in runs)
    expected = plan(llama)
    assert all(0 < host["written_bytes"] < expected.out_bytes for host in hosts(tmp_path))
    assert sum(host["in_bytes"] for host in hosts(tmp_path)) == expected.in_bytes
    assert sum(host["written_bytes"] for host in hosts(tmp_path)) == expected.out_bytes
    assert summary(tmp_path)["leaves"] == expected_leaves(tmp_path)


def test_two_processes(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """What each read and wrote, and the digests of what both wrote."""
    _, *arguments = command(llama, tmp_path)
    slicecast.run_processes(*arguments, prelude=SMALL_TILES)
    first, second = hosts(tmp_path)
    assert (first["process"], second["process"]) == (0, 1)
    expected = plan(llama)
    for name, total in {"in_bytes": expected.in_bytes, "written_bytes": expected.out_bytes}.items():
        assert first[name] + second[name] == total
        assert min(first[name], second[name]) > 0.3 * total
    assert min(first["peak_rss_bytes"], second["peak_rss_bytes"]) > 50e6
    assert summary(tmp_path)["leaves"] == expected_leaves(tmp_path)
