"""Several processes: the same checkpoint as from one, each source byte read once, and agreement before all writing."""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from slicecast.convert import orbax_checkpoint

# Leaves out every reading but that of the data, and says which process read what.
RECORD = """
import atexit, json, pathlib, sys
from slicecast.convert import pipeline
class Recording(pipeline.Reader):
    def __init__(self, path):
        super().__init__(path)
        self.spans = []
        recorders.append(self)
    def read(self, wanted):
        self.spans += [(span.file, span.offset, span.nbytes) for span in wanted]
        return super().read(wanted)
recorders = []
pipeline.Reader = Recording
def write():
    process = next((word.partition("=")[2] for word in sys.argv if word.startswith("--process_id=")), "0")
    (reader,) = recorders
    record = {{"spans": reader.spans, "counted": reader.bytes_read}}
    pathlib.Path({directory!r}, process + ".json").write_text(json.dumps(record))
atexit.register(write)
"""

# Tiles far smaller than ours, so that small leaves are cut along every axis that may be.
SMALL_TILES = """
from slicecast.convert import tiles
tiles.COLUMN_BYTES, tiles.MAX_CHUNK_BYTES, tiles.MAX_INNER_BYTES = 1 << 15, 1 << 13, 1 << 12
tiles.REQUEST_BYTES, tiles.SMALL_BYTES = 1 << 10, 1 << 11
"""

# Process i fails after some of its work, as if its disk did.
FAIL = """
import os
from slicecast.convert import pipeline
from slicecast.convert.errors import ReadError
class Failing(pipeline.Reader):
    def read(self, wanted):
        if os.environ.get("FAILS") and self.requests > 20:
            raise ReadError("model-00002-of-000003.safetensors: made to fail")
        return super().read(wanted)
pipeline.Reader = Failing
"""

CONFIGURATIONS = {"2x4": 2, "1x8": 1, "1x1": 0}

Intervals = list[tuple[int, int]]


class Layout(NamedTuple):
    """A source and how it is laid out."""

    family: str
    flags: tuple[str, ...]


LAYOUTS = {
    "kimi-scanned": Layout("kimi-k2.6", ()),
    "kimi-unscanned": Layout("kimi-k2.6", ("--scan_layers=false",)),
    "llama-axis0-float32": Layout("llama", ("--param_scan_axis=0", "--save_dtype=float32")),
}


class Conversions(NamedTuple):
    """A source converted by each of `CONFIGURATIONS`.

    Attributes:
        source: The source.
        outputs: The output directories by configuration.
        records: What each process has read, by configuration and process.
    """

    source: Path
    outputs: dict[str, Path]
    records: dict[str, dict[int, Any]]


@pytest.fixture(scope="module", params=LAYOUTS)
def conversions(
    request: pytest.FixtureRequest,
    module_slicecast: Any,
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Conversions:
    """A source in all configurations, with budgets that make many waves of different boxes."""
    layout = LAYOUTS[request.param]
    source = make_checkpoint(
        family=layout.family,
        layers=4,
        files=3,
        hidden=512,
        **({"experts": 12, "moe_intermediate": 256} if layout.family != "llama" else {}),
    )
    base = tmp_path_factory.mktemp("conversions")
    outputs, records = {}, {}
    for budget, (name, processes) in zip((0.04, 0.06, 0.3), CONFIGURATIONS.items(), strict=True):
        directory = base / f"{name}-records"
        directory.mkdir()
        outputs[name] = base / name
        options = [
            f"--hf_model_path={source}",
            f"--base_output_directory={outputs[name]}",
            f"--host_memory_gb={budget}",
        ]
        prelude = SMALL_TILES + RECORD.format(directory=str(directory))
        if processes > 1:
            module_slicecast.run_processes(*options, *layout.flags, processes=processes, prelude=prelude)
        else:
            devices = f"--simulated_cpu_devices_count={8 if processes else 1}"
            module_slicecast.run("convert", *options, *layout.flags, devices, prelude=prelude)
        records[name] = {int(path.stem): json.loads(path.read_text()) for path in directory.iterdir()}
    return Conversions(source, outputs, records)


def database(directory: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()


def chunk_shape(array: ts.TensorStore) -> tuple[int, ...]:
    """The shape of an array's chunks."""
    return tuple(size or 0 for size in array.chunk_layout.write_chunk.shape or ())


def contents(directory: Path) -> dict[str, bytes]:
    """All keys and values of a database."""
    store = database(directory)

    async def read() -> list[ts.KvStore.ReadResult]:
        return await asyncio.gather(*(store.read(key) for key in keys))

    keys = sorted(store.list().result())
    return {key.decode(): bytes(result.value) for key, result in zip(keys, asyncio.run(read()), strict=True)}


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a nested dict by path."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {
        path: leaf for key, child in tree.items() for path, leaf in flat(child, f"{prefix}/{key}".lstrip("/")).items()
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Checks that arrays are equal bit for bit."""
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype), path
        assert found[path].tobytes() == array.tobytes(), path


def coalesced(spans: Iterable[tuple[str, int, int]]) -> dict[str, Intervals]:
    """The bytes of each file that some spans cover, which must not overlap."""
    files: dict[str, Intervals] = defaultdict(list)
    for file, offset, nbytes in sorted(spans):
        if not nbytes:
            continue
        if files[file] and files[file][-1][1] >= offset:
            assert files[file][-1][1] == offset, f"{file}: byte {offset} is read twice"
            files[file][-1] = (files[file][-1][0], offset + nbytes)
        else:
            files[file].append((offset, offset + nbytes))
    return dict(files)


def used_tensors(source: Path) -> list[tuple[str, int, int]]:
    """Where the bytes of all tensors lie that a text model needs, from the headers: (file, offset, length)."""
    spans = []
    for path in sorted(source.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            unused = ("__metadata__", "vision_tower.", "mm_projector.")
            if not name.startswith(unused) and not name.endswith("weight_shape"):
                begin, end = entry["data_offsets"]
                spans.append((path.name, start + begin, end - begin))
    return spans


def test_the_source_verifies(slicecast: Any, conversions: Conversions) -> None:
    slicecast.run("verify", conversions.outputs["2x4"], f"--hf_model_path={conversions.source}")


def test_equal_arrays(conversions: Conversions) -> None:
    """Read as `verify` reads."""
    expected, *others = (
        {path: array.read().result() for path, array in orbax_checkpoint.open_arrays(output).items()}
        for output in conversions.outputs.values()
    )
    for found in others:
        assert_equal(found, expected)


def test_equal_arrays_to_orbax(conversions: Conversions) -> None:
    expected, *others = (
        flat(ocp.StandardCheckpointer().restore(output / "0" / "items")) for output in conversions.outputs.values()
    )
    for found in others:
        assert_equal(found, expected)


def test_equal_chunks(conversions: Conversions) -> None:
    """The same chunks, of the same layout, to the byte as they are compressed."""
    expected, *others = (contents(output / "0" / "items") for output in conversions.outputs.values())
    assert sum("/c/" in key for key in expected) > len(expected) / 2
    for found in others:
        assert found.keys() == expected.keys()
        assert [key for key in expected if found[key] != expected[key]] == []


def test_equal_tree_metadata(conversions: Conversions) -> None:
    """What Orbax writes about the tree and the step, but for the times."""
    trees = [json.loads((output / "0" / "items" / "_METADATA").read_text()) for output in conversions.outputs.values()]
    assert all(tree == trees[0] for tree in trees)
    steps = [json.loads((output / "0" / "_CHECKPOINT_METADATA").read_text()) for output in conversions.outputs.values()]
    assert all(step["custom_metadata"] == steps[0]["custom_metadata"] for step in steps)


def test_each_byte_is_read_once(conversions: Conversions) -> None:
    """The reads of all processes are disjoint and are the tensors that the model needs, no byte more."""
    used = used_tensors(conversions.source)
    for name, processes in conversions.records.items():
        assert sorted(processes) == list(range(CONFIGURATIONS[name] or 1))
        spans = [tuple(span) for record in processes.values() for span in record["spans"]]
        assert coalesced(spans) == coalesced(used)
        assert sum(record["counted"] for record in processes.values()) == sum(nbytes for _, _, nbytes in used)


def test_the_work_is_balanced(conversions: Conversions) -> None:
    """Each process reads and writes about the same, together."""
    arrays = orbax_checkpoint.open_arrays(conversions.outputs["2x4"])
    chunk_bytes = {
        path.replace("/", "."): math.prod(chunk_shape(array)) * array.dtype.numpy_dtype.itemsize
        for path, array in arrays.items()
    }
    loads = []
    for process, record in conversions.records["2x4"].items():
        databases = (conversions.outputs["2x4"] / "0" / "items").glob(f"ocdbt.process_{process}x*")
        keys = [key.decode() for directory in databases for key in database(directory).list().result()]
        written = sum(chunk_bytes[key.partition("/")[0]] for key in keys if "/c/" in key)
        loads.append(record["counted"] + written)
    assert min(loads) > 0.8 * max(loads)


@pytest.mark.parametrize("source", ["kimi", "llama"])
@pytest.mark.parametrize("scan", ["true", "false"])
def test_leaves_cut_along_every_axis(
    slicecast: Any, request: pytest.FixtureRequest, tmp_path: Path, source: str, scan: str
) -> None:
    """What large leaves go through: boxes of a part of the rows, of the experts, of the layers, on several devices."""
    model = request.getfixturevalue(source)
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={model}", f"--base_output_directory={output}", f"--scan_layers={scan}"]
    options = ["--host_memory_gb=0.001", "--simulated_cpu_devices_count=4"]
    done = slicecast.run("convert", *arguments, *options, prelude=SMALL_TILES)
    array = orbax_checkpoint.open_arrays(output)["params/params/token_embedder/embedding"]
    assert chunk_shape(array) < array.shape, done.stderr
    slicecast.run("verify", output, f"--hf_model_path={model}")


def test_unshared_output(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """Each process has a disk of its own: all refuse, and none writes."""
    outputs = [tmp_path / "first", tmp_path / "second"]
    extra = {i: [f"--base_output_directory={output}"] for i, output in enumerate(outputs)}
    done = slicecast.run_processes(f"--hf_model_path={kimi}", extra=extra, check=False)
    for one, output in zip(done, outputs, strict=True):
        assert one.returncode == 1
        assert "Traceback" not in one.stderr
        last = one.stderr.splitlines()[-1]
        assert last.startswith(f"slicecast: OutputError: {output}: ")
        assert "share" in last
        assert not list(output.rglob("*"))


@pytest.mark.parametrize("flag", ["--save_dtype=float32", "--hf_model_path={llama}"], ids=["dtype", "source"])
def test_processes_with_different_flags(slicecast: Any, kimi: Path, llama: Path, tmp_path: Path, flag: str) -> None:
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}"]
    extra = {1: [flag.format(llama=llama)]}
    for one in slicecast.run_processes(*arguments, extra=extra, check=False):
        assert one.returncode == 2
        assert "Traceback" not in one.stderr
        last = one.stderr.splitlines()[-1]
        assert last.startswith("slicecast: UsageError: ")
        assert "processes [1]" in last
    assert not output.exists()


def test_processes_with_different_budgets(slicecast: Any, kimi: Path, tmp_path: Path) -> None:
    """As on hosts with different free memory and no `--host_memory_gb`: they agree, or refuse each other."""
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}"]
    extra = {0: ["--host_memory_gb=0.01"], 1: ["--host_memory_gb=0.05"]}
    done = slicecast.run_processes(*arguments, extra=extra, check=False, timeout=90)
    if all(one.returncode == 2 for one in done):
        assert all(one.stderr.splitlines()[-1].startswith("slicecast: UsageError: ") for one in done)
        assert not output.exists()
    else:
        assert [one.returncode for one in done] == [0, 0], done[0].stderr
        slicecast.run("verify", output, f"--hf_model_path={kimi}")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_all(slicecast: Any, kimi: Path, tmp_path: Path, failing: int) -> None:
    """Nobody waits for a process that has given up, its message is the last that it says, and a rerun goes on."""
    output = tmp_path / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", "--host_memory_gb=0.01"]
    done = slicecast.run_processes(
        *arguments, environments={failing: {"FAILS": "1"}}, prelude=FAIL, check=False, timeout=90
    )
    assert done[failing].returncode == 42
    assert done[1 - failing].returncode != 0
    last = done[failing].stderr.splitlines()[-1]
    assert last.startswith("slicecast: ReadError: model-00002-of-000003.safetensors")
    assert not (output / "0").exists()
    slicecast.run_processes(*arguments)
    slicecast.run("verify", output, f"--hf_model_path={kimi}")


def test_more_processes_than_work(slicecast: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Processes that have nothing to do take part nevertheless."""
    source = make_checkpoint(family="llama", layers=1, hidden=32, intermediate=32, vocab=4096, heads=2, files=1)
    output = tmp_path / "output"
    slicecast.run_processes(f"--hf_model_path={source}", f"--base_output_directory={output}", processes=4)
    slicecast.run("verify", output, f"--hf_model_path={source}")
