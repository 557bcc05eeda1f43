"""Checkpoints with OCDBT and zarr3 on or off: each is right, is what it says, is read by Orbax, and survives kills."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import test_orbax_readers
from etils import epath

from slicecast.convert import chunk_store, commands
from slicecast.convert.box import Box
from slicecast.convert.chunk_store import ArraySpec, Block, ChunkFormat, ChunkReader, ChunkWriter
from slicecast.convert.memory import Machine
from slicecast.convert.pipeline import array_spec
from slicecast.convert.settings import Settings

FORMATS = {
    "ocdbt-zarr3": ChunkFormat(ocdbt=True, zarr3=True),
    "ocdbt-zarr2": ChunkFormat(ocdbt=True, zarr3=False),
    "files-zarr3": ChunkFormat(ocdbt=False, zarr3=True),
    "files-zarr2": ChunkFormat(ocdbt=False, zarr3=False),
}

# Two dozen waves of the tiny Kimi-K2.6.
BUDGET_BYTES = 5_000_000

# Kills the process once there are some more files with chunks, in the middle of a wave or between two.
KILL = """
import os, pathlib, signal, threading
def count():
    paths = (path for pattern in {patterns!r} for path in pathlib.Path({output!r}).glob(pattern))
    return sum(1 for path in paths if path.is_file())
def watch(limit):
    while count() < limit:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, args=(count() + {files},), daemon=True).start()
from slicecast.convert import pipeline
import time
class Slow(pipeline.Reader):
    def read(self, wanted):
        time.sleep(0.02)
        return super().read(wanted)
pipeline.Reader = Slow
"""

# Where chunks lie: in the data files of databases, or as files of their own.
DATA = ("0*/items*/ocdbt.process_*/d/*", "0*/items*/params.*/**/*")

# Leaves one chunk out.
FORGET = """
from slicecast.convert import chunk_store
missing = chunk_store.ChunkWriter.missing
chunk_store.ChunkWriter.missing = lambda self, array, box: [
    chunk for chunk in missing(self, array, box) if self.format.key(array, chunk) != {key!r}
]
"""

SCALAR = ArraySpec("a.scalar", (), "float32", (), ())
VECTOR = ArraySpec("a.vector", (10,), "bfloat16", (4,), (2,))
MATRIX = ArraySpec("a.b.matrix", (4, 6), "bfloat16", (2, 2), (2, 1))
QUANTIZED = ArraySpec("c", (4, 4), "float8_e4m3fn", (4, 2), (4, 2))


@pytest.fixture(params=FORMATS)
def chunk_format(request: pytest.FixtureRequest) -> ChunkFormat:
    return FORMATS[request.param]


def flags(chunk_format: ChunkFormat) -> list[str]:
    return [
        f"--checkpoint_storage_use_ocdbt={chunk_format.ocdbt}",
        f"--checkpoint_storage_use_zarr3={chunk_format.zarr3}",
    ]


def specs(source: Path) -> list[ArraySpec]:
    """How the leaves should be stored."""
    plan = commands.make_plan(Settings(hf_model_path=str(source)), Machine(1, 1, 10**9, None))
    return [array_spec(planned) for planned in plan.leaves]


@pytest.mark.parametrize(
    ("array", "zarr3", "zarr2"),
    [
        (SCALAR, ["c"], ["0"]),
        (VECTOR, ["c/0", "c/1", "c/2"], ["0", "1", "2"]),
        (
            MATRIX,
            ["c/0/0", "c/0/1", "c/0/2", "c/1/0", "c/1/1", "c/1/2"],
            ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"],
        ),
    ],
    ids=["scalar", "vector", "matrix"],
)
def test_keys(array: ArraySpec, zarr3: list[str], zarr2: list[str]) -> None:
    for chunk_format in FORMATS.values():
        expected = [f"{array.name}/{key}" for key in (zarr3 if chunk_format.zarr3 else zarr2)]
        assert list(chunk_format.keys(array)) == expected
        chunks = Box.whole(array.shape).tiles(array.chunk)
        assert [chunk_format.key(array, chunk) for chunk in chunks] == expected
        last = "zarr.json" if chunk_format.zarr3 else ".zarray"
        assert chunk_format.metadata_key(array) == f"{array.name}/{last}"


def write(directory: Path, chunk_format: ChunkFormat, values: dict[ArraySpec, np.ndarray]) -> dict[str, str]:
    """Writes whole arrays."""
    directory.mkdir(exist_ok=True)
    writer = ChunkWriter(
        epath.Path(directory), list(values), 0, writes_metadata=True, chunk_format=chunk_format, plan="a" * 64
    )
    return writer.write([Block(array, Box.whole(array.shape), content) for array, content in values.items()])


def storage(directory: Path, chunk_format: ChunkFormat) -> Any:
    """The specification of the storage of a checkpoint's arrays."""
    files = f"file://{directory}/"
    return {"driver": "ocdbt", "base": files} if chunk_format.ocdbt else files


def opened(directory: Path, chunk_format: ChunkFormat) -> ts.KvStore:
    return ts.KvStore.open(storage(directory, chunk_format)).result()


def keys(store: ts.KvStore) -> set[str]:
    return {key.decode() for key in store.list().result()}


@pytest.mark.parametrize("filled", [True, False], ids=["values", "zeros"])
def test_the_keys_are_those_of_tensorstore(tmp_path: Path, chunk_format: ChunkFormat, filled: bool) -> None:
    """Of chunks of zeros too: a key that is missing means a chunk that was not written. And values come back."""
    rng = np.random.default_rng(0)
    values = {
        array: (filled * rng.normal(size=array.shape)).astype(array.dtype)
        for array in (SCALAR, VECTOR, MATRIX, QUANTIZED)
    }
    digests = write(tmp_path / "items", chunk_format, values)
    expected = {key for array in values for key in chunk_format.keys(array)}
    assert digests.keys() == expected
    expected |= {chunk_format.metadata_key(array) for array in values}
    databases = list((tmp_path / "items").glob("ocdbt.process_0x*"))
    assert len(databases) == chunk_format.ocdbt
    directory = databases[0] if databases else tmp_path / "items"
    assert keys(opened(directory, chunk_format)) == expected
    reader = ChunkReader(epath.Path(directory), chunk_format)
    for array, content in values.items():
        found = reader.open(array.name).read().result()
        assert found.dtype == content.dtype
        assert found.tobytes() == content.tobytes()


class Converted(NamedTuple):
    """A finished checkpoint.

    Attributes:
        source: Its source.
        output: Its output directory. Not to be changed.
        format: How its chunks are stored.
    """

    source: Path
    output: Path
    format: ChunkFormat

    @property
    def items(self) -> Path:
        """Where the arrays lie."""
        return self.output / "0" / "items"


@pytest.fixture(scope="module", params=FORMATS)
def converted(
    request: pytest.FixtureRequest, module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    """The tiny Kimi-K2.6 in each format."""
    output = tmp_path_factory.mktemp("converted") / "output"
    chunk_format = FORMATS[request.param]
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", *flags(chunk_format)]
    module_slicecast.run("convert", *arguments)
    return Converted(kimi, output, chunk_format)


def test_the_values_are_right(slicecast: Any, converted: Converted) -> None:
    done = slicecast.run("verify", converted.output, f"--hf_model_path={converted.source}")
    assert "all equal to the source, bit for bit" in done.stdout


def read_everywhere(output: str, result: str) -> None:
    """Reads a checkpoint as `test_orbax_readers.py` does, and as MaxText does with any of its flags."""

    def as_maxtext_does(chunk_format: ChunkFormat) -> Callable[[test_orbax_readers.Target], Any]:
        def read(target: test_orbax_readers.Target) -> Any:
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=chunk_format.ocdbt, use_zarr3=chunk_format.zarr3)
            return ocp.Checkpointer(handler).restore(
                epath.Path(target.items), item=target.tree, transforms={}, restore_args=target.restore_args
            )

        return read

    for name, chunk_format in FORMATS.items():
        test_orbax_readers.READERS[f"MaxText for {name}"] = as_maxtext_does(chunk_format)
    test_orbax_readers.read_everywhere(output, result)


def test_orbax_reads_it(slicecast: Any, converted: Converted, tmp_path: Path) -> None:
    """Whatever the reader expects: the checkpoint says what it is."""
    result = tmp_path / "result.json"
    code = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_chunk_formats\ntest_chunk_formats.read_everywhere({str(converted.output)!r}, {str(result)!r})"
    )
    slicecast.execute(code)
    wrong = json.loads(result.read_text())
    assert len(wrong) == len(test_orbax_readers.READERS) + len(FORMATS)
    assert wrong == {name: [] for name in wrong}


def test_nothing_but_the_arrays_is_stored(converted: Converted) -> None:
    chunk_format = converted.format
    arrays = specs(converted.source)
    expected = {key for array in arrays for key in (chunk_format.metadata_key(array), *chunk_format.keys(array))}
    assert len(expected) > 2 * len(arrays)
    found = keys(opened(converted.items, chunk_format))
    own = {path.name for path in converted.items.iterdir() if path.is_file()}  # Of Orbax.
    assert (found if chunk_format.ocdbt else found - own) == expected
    assert (converted.items / "manifest.ocdbt").exists() == chunk_format.ocdbt
    assert bool(list(converted.items.glob("ocdbt.process_*"))) == chunk_format.ocdbt
    assert chunk_store.missing_keys(epath.Path(converted.items), arrays, chunk_format) == []
    assert json.loads((converted.items / "_METADATA").read_text())["use_zarr3"] == chunk_format.zarr3


def test_arrays_are_stored_as_declared(converted: Converted) -> None:
    store = opened(converted.items, converted.format)
    for array in specs(converted.source):
        found = json.loads(store.read(converted.format.metadata_key(array)).result().value)
        assert found["zarr_format"] == (3 if converted.format.zarr3 else 2)
        assert found["shape"] == list(array.shape)
        if converted.format.zarr3:
            assert found["data_type"] == array.dtype
            assert found["chunk_grid"]["configuration"]["chunk_shape"] == list(array.chunk)
        else:
            assert found["dtype"] == {"float32": "<f4", "bfloat16": "bfloat16"}[array.dtype]
            assert found["chunks"] == list(array.chunk)
            assert found["order"] == "C"
            assert (found["compressor"]["id"], found["compressor"]["level"]) == ("zstd", 1)


def data(output: Path) -> dict[str, tuple[int, int]]:
    """The files with chunks, by their paths below the item, with when they were written and their size."""
    files = (path for pattern in DATA for path in output.glob(pattern) if path.is_file())
    return {
        path.relative_to(next(parent for parent in path.parents if parent.name.startswith("items"))).as_posix(): (
            path.stat().st_mtime_ns,
            path.stat().st_size,
        )
        for path in files
        if not path.name.endswith(".__lock")
    }


def test_another_format_is_refused(slicecast: Any, converted: Converted) -> None:
    before = data(converted.output)
    arguments = [f"--hf_model_path={converted.source}", f"--base_output_directory={converted.output}"]
    other = ChunkFormat(converted.format.ocdbt, not converted.format.zarr3)
    done = slicecast.run("convert", *arguments, *flags(other), check=False)
    assert done.returncode == 1
    assert "a finished checkpoint of another source, or with other flags" in done.stderr.splitlines()[-1]
    assert data(converted.output) == before


# `test_resume.py` has the default one, in more ways.
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "ocdbt-zarr3"])
def test_killed_and_resumed(slicecast: Any, kimi: Path, tmp_path: Path, name: str) -> None:
    """Nothing that was done is done again, and nothing can be loaded before all is done, to the last chunk."""
    output = tmp_path / "output"
    chunk_format = FORMATS[name]
    plan = commands.make_plan(Settings(hf_model_path=str(kimi)), Machine(1, 1, BUDGET_BYTES, None))
    arguments = ["convert", f"--hf_model_path={kimi}", f"--base_output_directory={output}", *flags(chunk_format)]
    arguments += [f"--host_memory_gb={BUDGET_BYTES / 1e9}"]

    files = 9 if chunk_format.ocdbt else len(plan.leaves) + 6  # There, each leaf has a file of metadata too.
    prelude = KILL.format(output=str(output), patterns=DATA, files=files)
    done = slicecast.run(*arguments, prelude=prelude, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (output / "0").exists()
    killed = data(output)
    assert killed

    # Of a leaf of several chunks: one that lacks all of them is missed by Orbax too.
    last = [work for work in plan.boxes if work.leaf.chunk_count > 1][-1]
    forgotten = chunk_format.key(array_spec(last.leaf), last.box)
    done = slicecast.run(*arguments, prelude=FORGET.format(key=forgotten), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("slicecast: IncompleteError: ")
    assert f"1 chunks are missing, among them ['{forgotten}']" in message
    assert not (output / "0").exists()
    forgetful = data(output)
    assert killed.items() <= forgetful.items()

    done = slicecast.run(*arguments)
    assert f": 1 waves written, {len(plan.waves[0]) - 1} had been written before" in done.stderr
    assert forgetful.items() <= data(output).items()
    slicecast.run("verify", output, f"--hf_model_path={kimi}")


def test_missing_keys_are_found(tmp_path: Path, chunk_format: ChunkFormat) -> None:
    """Of metadata and of chunks, in order."""
    for array in (SCALAR, MATRIX):
        spec = chunk_format.array(array, storage(tmp_path, chunk_format))
        ts.open(spec, create=True).result().write(np.ones(array.shape, array.dtype)).result()
    directory = epath.Path(tmp_path)
    assert chunk_store.missing_keys(directory, [SCALAR, MATRIX], chunk_format) == []
    _, second, *_ = chunk_format.keys(MATRIX)
    removed = [*chunk_format.keys(SCALAR), chunk_format.metadata_key(MATRIX), second]
    for key in removed:
        opened(tmp_path, chunk_format).write(key, None).result()
    assert chunk_store.missing_keys(directory, [SCALAR, MATRIX], chunk_format) == removed
