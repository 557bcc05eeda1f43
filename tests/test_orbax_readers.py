"""The written checkpoint is an ordinary Orbax checkpoint: every reader loads it, and it is stored as we say.

Also: what `orbax_checkpoint.py` knows of Orbax without Orbax promising it still holds.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import ml_dtypes  # noqa: F401  Makes NumPy know bfloat16.
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint import v1

from slicecast.convert import chunk_store, commands, orbax_checkpoint
from slicecast.convert.memory import Machine
from slicecast.convert.pipeline import array_spec
from slicecast.convert.settings import Settings

DEVICES = 8

FORMAT = chunk_store.ChunkFormat()


class Target(NamedTuple):
    """What a reader is asked for.

    Attributes:
        step: The directory of the step.
        items: The directory of the item.
        tree: Shapes, dtypes, and shardings over a mesh that the checkpoint was not written with.
    """

    step: Path
    items: Path
    tree: Any

    @property
    def restore_args(self) -> Any:
        """The shardings, as the older readers take them."""
        return ocp.checkpoint_utils.construct_restore_args(self.tree)

    @property
    def part(self) -> Any:
        """The tree of two leaves only."""
        params = self.tree["params"]["params"]
        decoder = {"decoder_norm": params["decoder"]["decoder_norm"]}
        return {"params": {"params": {"decoder": decoder, "token_embedder": params["token_embedder"]}}}


def as_maxtext_does(target: Target) -> Any:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    checkpointer = ocp.Checkpointer(handler)
    return checkpointer.restore(
        epath.Path(target.items), item=target.tree, transforms={}, restore_args=target.restore_args
    )


def pytree(target: Target) -> Any:
    restore = ocp.args.PyTreeRestore(item=target.tree, restore_args=target.restore_args)
    return ocp.PyTreeCheckpointer().restore(target.items, args=restore)


def pytree_in_numpy(target: Target) -> Any:
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target.tree)
    return ocp.PyTreeCheckpointer().restore(target.items, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def partial(target: Target) -> Any:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target.part)
    restore = ocp.args.PyTreeRestore(item=target.part, restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointer().restore(target.items, args=restore)


def manager(target: Target) -> Any:
    with ocp.CheckpointManager(target.step.parent) as checkpoints:
        assert checkpoints.latest_step() == 0
        restore = ocp.args.Composite(items=ocp.args.StandardRestore(target.tree))
        return checkpoints.restore(0, args=restore)["items"]


READERS: dict[str, Callable[[Target], Any]] = {
    "MaxText": as_maxtext_does,
    "StandardCheckpointer": lambda target: ocp.StandardCheckpointer().restore(target.items, target.tree),
    "StandardCheckpointer without a target": lambda target: ocp.StandardCheckpointer().restore(target.items),
    "PyTreeCheckpointer": pytree,
    "PyTreeCheckpointer to NumPy": pytree_in_numpy,
    "partial restore": partial,
    "CheckpointManager": manager,
    "v1 load": lambda target: v1.load(target.step, target.tree),
    "v1 load_checkpointables": lambda target: v1.load_checkpointables(target.step, {"items": target.tree})["items"],
}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf for key, child in tree.items() for path, leaf in flat(child, f"{prefix}/{key}".lstrip("/")).items()
    }


def nested(leaves: dict[str, Any]) -> Any:
    """The nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def read_everywhere(output: str, result: str) -> None:
    """Reads a checkpoint with all readers on 8 devices, in a process of its own, and writes what is wrong for each."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    expected = {path: array.read().result() for path, array in orbax_checkpoint.open_arrays(Path(output)).items()}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    tree = nested({path: abstract(array, mesh) for path, array in expected.items()})
    target = Target(Path(output, "0"), Path(output, "0", "items"), tree)
    wrong = {name: differences(read(target), expected, target) for name, read in READERS.items()}
    Path(result).write_text(json.dumps(wrong))


def abstract(array: np.ndarray, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The array's shape and dtype, with its last axes spread over the mesh wherever they can be."""
    free = list(mesh.axis_names)
    spec: list[str | None] = []
    for size in reversed(array.shape):
        spec.insert(0, free.pop() if free and size % mesh.shape[free[-1]] == 0 else None)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def differences(tree: Any, expected: dict[str, np.ndarray], target: Target) -> list[str]:
    """What is wrong with a tree that was read."""
    found, abstracts = flat(tree), flat(target.tree)
    wrong = [path for path in found if path not in expected]
    if len(found) != len(flat(target.part)):
        wrong += [path for path in expected if path not in found]
    for path, array in found.items():
        if path not in expected or array.dtype != expected[path].dtype or array.shape != expected[path].shape:
            wrong.append(path)
        elif np.asarray(array).tobytes() != expected[path].tobytes():
            wrong.append(f"{path}: values")
        elif isinstance(array, jax.Array) and array.sharding != abstracts[path].sharding:
            wrong.append(f"{path}: {array.sharding}")
    return wrong


class Written(NamedTuple):
    """A checkpoint that was written.

    Attributes:
        source: Its source.
        output: Its output directory. Not to be changed.
        scan_layers: Whether layers are stacked in it.
    """

    source: Path
    output: Path
    scan_layers: bool


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "unscanned"])
def written(
    request: pytest.FixtureRequest, module_slicecast: Any, kimi: Path, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    output = tmp_path_factory.mktemp("written") / "output"
    arguments = [f"--hf_model_path={kimi}", f"--base_output_directory={output}", f"--scan_layers={request.param}"]
    module_slicecast.run("convert", *arguments, "--host_memory_gb=0.01")
    return Written(kimi, output, request.param)


@pytest.fixture(scope="module")
def results(written: Written, module_slicecast: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong for each reader."""
    result = tmp_path_factory.mktemp("results") / "results.json"
    code = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_orbax_readers\ntest_orbax_readers.read_everywhere({str(written.output)!r}, {str(result)!r})"
    )
    module_slicecast.execute(code)
    wrong: dict[str, list[str]] = json.loads(result.read_text())
    return wrong


def specs(written: Written) -> list[chunk_store.ArraySpec]:
    """How the leaves should be stored."""
    settings = Settings(hf_model_path=str(written.source), scan_layers=written.scan_layers)
    plan = commands.make_plan(settings, Machine(1, 1, 10**9, None))
    return [array_spec(planned) for planned in plan.leaves]


def database(directory: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()


@pytest.mark.parametrize("reader", READERS)
def test_readers(results: dict[str, list[str]], reader: str) -> None:
    """Each reader gives the values that `verify` sees, bit for bit, sharded as it was asked to."""
    assert results[reader] == []


def test_custom_metadata(written: Written) -> None:
    """MaxText reads `scan_layers` there."""
    with ocp.CheckpointManager(written.output) as checkpoints:
        custom = checkpoints.metadata(0).custom_metadata
    assert custom["scan_layers"] is written.scan_layers
    assert dict(v1.metadata(written.output / "0").custom_metadata)["scan_layers"] is written.scan_layers
    assert orbax_checkpoint.read_custom_metadata(written.output / "0") == custom


def test_arrays_are_stored_as_declared(written: Written) -> None:
    """Chunks, inner chunks and codecs: zstd level 1, and a crc32c around it."""
    store = database(written.output / "0" / "items")
    for spec in specs(written):
        stored = json.loads(store.read(FORMAT.metadata_key(spec)).result().value)
        declared = FORMAT.array(spec, "memory://")["metadata"]
        for field in ("shape", "data_type", "fill_value", "chunk_grid"):
            assert stored[field] == declared[field]
        (sharding,) = stored["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == list(spec.inner)
        codecs = sharding["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]
        assert codecs[0]["configuration"] == {"endian": "little"}
        assert codecs[1]["configuration"]["level"] == 1
        assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


def test_nothing_but_the_chunks_is_stored(written: Written) -> None:
    items = written.output / "0" / "items"
    declared = {key for spec in specs(written) for key in (FORMAT.metadata_key(spec), *FORMAT.keys(spec))}
    assert {key.decode() for key in database(items).list().result()} == declared
    assert chunk_store.missing_keys(items, specs(written), FORMAT) == []


def test_missing_chunks_are_found(written: Written, tmp_path: Path) -> None:
    """Whatever is taken away, the check before the commit names it."""
    shutil.copytree(written.output, tmp_path / "output")
    items = tmp_path / "output" / "0" / "items"
    leaf = max(specs(written), key=lambda spec: len(list(FORMAT.keys(spec))))
    first, *_, last = FORMAT.keys(leaf)
    removed = [FORMAT.metadata_key(leaf), first, last]
    for key in removed:
        database(items).delete_range(ts.KvStore.KeyRange(key, f"{key}\0")).result()
    assert chunk_store.missing_keys(items, specs(written), FORMAT) == removed


class Spy(ocp_path.atomicity.AtomicRenameTemporaryPath):  # type: ignore[misc]
    """A temporary directory that tells what Orbax does with it."""

    calls: ClassVar[list[str]] = []

    async def create(self) -> epath.Path:
        """Tells that the directory is made."""
        self.calls.append(f"create {self.get().name}")
        return await super().create()

    async def finalize(self) -> None:
        """Tells that the directory is renamed, and whether the step has metadata by then."""
        self.calls.append(f"finalize {self.get().name} into {self.get_final().name}")
        step = self.get() if self.get().name.startswith("0") else self.get().parent
        self.calls.append(f"metadata {(step / '_CHECKPOINT_METADATA').exists()}")
        await super().finalize()


@pytest.fixture
def by_orbax(tmp_path: Path) -> Path:
    """A small checkpoint that Orbax wrote by itself, in the way in which we have it write ours."""
    Spy.calls.clear()
    handler = ocp.CompositeCheckpointHandler(
        items=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
        composite_options=ocp.CompositeOptions(temporary_path_class=Spy),
    )
    tree = {"a": {"b": {"c": jax.numpy.arange(8.0)}}}
    with ocp.AsyncCheckpointer(handler, temporary_path_class=Spy) as checkpointer:
        arguments = ocp.args.Composite(items=ocp.args.PyTreeSave(tree))
        checkpointer.save(tmp_path / "output" / "0", args=arguments, custom_metadata={"scan_layers": True})
        checkpointer.wait_until_finished()
    return tmp_path / "output"


def test_facts_about_temporary_directories(by_orbax: Path) -> None:
    """Their names, that both are made and finished through our class, and that the step is finished last."""
    assert Spy.calls == [
        "create 0.orbax-checkpoint-tmp",
        "create items.orbax-checkpoint-tmp",
        "finalize items.orbax-checkpoint-tmp into items",
        "metadata True",
        "finalize 0.orbax-checkpoint-tmp into 0",
        "metadata True",
    ]
    assert (by_orbax / "0" / "items" / "commit_success.txt").exists()
    assert (by_orbax / "0" / "commit_success.txt").exists()


def test_facts_about_metadata(by_orbax: Path) -> None:
    """The name of the step's metadata file and of the field in it; how the tree metadata calls an array."""
    step = by_orbax / "0"
    assert json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == {"scan_layers": True}
    assert orbax_checkpoint.read_custom_metadata(step) == {"scan_layers": True}
    (entry,) = json.loads((step / "items" / "_METADATA").read_text())["tree_metadata"].values()
    assert entry["value_metadata"]["value_type"] == "jax.Array"


def test_facts_about_databases(by_orbax: Path) -> None:
    """Where each process writes, and that the keys of an array begin with its path's keys, joined by dots."""
    items = by_orbax / "0" / "items"
    (process,) = items.glob(f"{chunk_store.PROCESS_PREFIX}*")
    for directory in (items, process):
        keys = {key.decode() for key in database(directory).list().result()}
        assert "a.b.c/zarr.json" in keys
        assert all(key.startswith("a.b.c/") for key in keys)


def test_our_tree_metadata_is_orbax_own(written: Written, by_orbax: Path) -> None:
    """Ours differs from Orbax' own only in the leaves, and in the shape of a process's part, which no reader needs."""
    ours, theirs = (
        json.loads((output / "0" / "items" / "_METADATA").read_text()) for output in (written.output, by_orbax)
    )
    assert {name: value for name, value in ours.items() if name != "tree_metadata"} == {
        name: value for name, value in theirs.items() if name != "tree_metadata"
    }
    (their_entry,) = theirs["tree_metadata"].values()
    their_entry["value_metadata"].pop("write_shape", None)
    for name, entry in ours["tree_metadata"].items():
        assert entry["value_metadata"] == their_entry["value_metadata"], name
        assert entry.keys() == their_entry.keys()
