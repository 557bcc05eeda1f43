"""Measures what loading a checkpoint reads: bytes, requests and seconds, by mesh and by how the checkpoint was cut.

    .venv/bin/python scripts/bench_restore.py --work_dir DIR            # a quarter of an hour on two cores, 12 GB
    .venv/bin/python scripts/bench_restore.py --work_dir DIR --tiny     # the same with models of a few MB

Makes checkpoints of two models, at true widths with few layers and experts, and lets several processes with simulated
devices restore them as MaxText does, each device its shard. Each checkpoint is there in three layouts: converted
without the flags of a mesh ("default"), with those of the mesh that reads ("cut for it"), and as MaxText's converter
writes it ("MaxText's"): Orbax, on one host, with arrays cut into 16 along their first axis, or their second.

Prints a Markdown table. `needed` is what the shards of each process take of the stored bytes, summed over processes;
`read` is what TensorStore read from files, as it counts itself, over `needed`; `seconds` are those of the slowest
process, the median of the repetitions. All values are compared with those of the source, and a difference is an error.
"""

import argparse
import functools
import math
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slicecast.convert import commands, orbax_checkpoint
from slicecast.convert.mapping.target import Leaf
from slicecast.convert.memory import Machine
from slicecast.convert.settings import Settings
from slicecast.convert.sharding import Sharding, axis_rules

T = TypeVar("T")

# Sixteen chips: the meshes for which MaxText's recipes cut most often, mixed ones, and the one that the default does
# not care for. Llama's 8 heads of keys keep tensor parallelism from 16.
MESHES: tuple[dict[str, int], ...] = (
    {"fsdp": 16},
    {"fsdp": 8, "expert": 2},
    {"fsdp": 2, "expert": 8},
    {"expert": 16},
    {"fsdp": 4, "tensor": 4},
    {"fsdp": 2, "tensor": 8},
)
PROCESSES = 4
# The widths of Kimi-K2.6 and of Llama-3.1-70B, at which chunks are cut as in the whole models: about 2 GB each.
MODELS = {
    "Kimi": "--family=kimi-k2.6 --true_sizes --layers=2 --dense_layers=1 --experts=16 --intermediate=4096 --vocab=4096",
    "Llama": "--family=llama --true_sizes --hidden=8192 --intermediate=28672 --heads=64 --layers=1 --vocab=4096",
}

TINY_MESHES: tuple[dict[str, int], ...] = ({"fsdp": 4}, {"fsdp": 2, "expert": 2})
TINY_PROCESSES = 2
TINY_MODELS = {"Kimi": "--family=kimi-k2.6 --layers=2 --hidden=1024 --moe_intermediate=512 --experts=8"}

# What MaxText's converter cuts into, and the size up to which Orbax leaves a part in one chunk; both are its defaults.
MAXTEXT_DEVICES = 16
MAXTEXT_CHUNK_BYTES = 2 << 30


@dataclass(frozen=True)
class Job:
    """A checkpoint to restore.

    Attributes:
        layout: How it was cut.
        output: Where it is.
        repetitions: How often it is restored.
    """

    layout: str
    output: str
    repetitions: int


@dataclass(frozen=True)
class Measured:
    """What a process measured of a job.

    Attributes:
        needed: The bytes of its shards in memory, each part of a leaf once.
        bytes_read: The bytes that it read from files for them.
        requests: In how many reads.
        seconds: How long each repetition took.
    """

    needed: int
    bytes_read: int
    requests: int
    seconds: list[float]


def main(arguments: Sequence[str]) -> None:
    """Makes, restores and compares all checkpoints, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a directory for temporary files")
    parser.add_argument("--repetitions", type=int, default=3, help="restores of each checkpoint (default: 3)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a model of a few MB, two meshes and two processes")
    flags = parser.parse_args(arguments)
    models = TINY_MODELS if flags.tiny else {name: MODELS[name] for name in flags.models}
    meshes, processes = (TINY_MESHES, TINY_PROCESSES) if flags.tiny else (MESHES, PROCESSES)

    print("| model | mesh | layout | needed GB | read / needed | requests | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for name, sizes in models.items():
        for mesh, layout, figures in measure(
            flags.work_dir.resolve() / name, sizes, meshes, processes, flags.repetitions
        ):
            print(f"| {name} | {mesh} | {layout} | {figures} |", flush=True)


def measure(
    work: Path, sizes: str, meshes: Sequence[Mapping[str, int]], processes: int, repetitions: int
) -> Iterator[tuple[str, str, str]]:
    """For each mesh and each layout: their names, and the figures of a model."""
    shutil.rmtree(work, ignore_errors=True)
    source, values = work / "hf", work / "values"
    make_checkpoint(source, sizes)
    convert(source, work / "default", {})
    _run(*_SLICECAST, "verify", work / "default", f"--hf_model_path={source}")
    keep_values(work / "default", values)
    in_processes(write_as_maxtext, (str(source), str(values), str(work / "maxtext")), 1, MAXTEXT_DEVICES)
    for mesh in meshes:
        convert(source, work / "cut", mesh)
        layouts = {"default": work / "default", "cut for it": work / "cut", "MaxText's": work / "maxtext"}
        jobs = [Job(layout, str(output), repetitions) for layout, output in layouts.items()]
        devices = math.prod(mesh.values()) // processes
        of_processes = in_processes(restore, (str(source), str(values), mesh, jobs), processes, devices)
        for job, *measured in zip(jobs, *of_processes, strict=True):
            name = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
            yield name, job.layout, summary(job, measured, values)
        shutil.rmtree(work / "cut")
    shutil.rmtree(work)


def summary(job: Job, measured: Sequence[Measured], values: Path) -> str:
    """The figures of all processes together."""
    stored, whole = (sum(file.stat().st_size for file in Path(path).rglob("*")) for path in (job.output, values))
    needed = sum(one.needed for one in measured) * stored / whole
    read = sum(one.bytes_read for one in measured)
    requests = sum(one.requests for one in measured)
    seconds = statistics.median(max(times) for times in zip(*(one.seconds for one in measured), strict=True))
    return f"{needed / 1e9:.3f} | {read / needed:.2f} | {requests} | {seconds:.1f}"


def in_processes(function: Callable[..., T], arguments: tuple[Any, ...], processes: int, devices: int) -> list[T]:
    """What a function returns in processes that JAX has joined, each with simulated devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(_joined, function, arguments, address, processes, process, devices)
            for process in range(processes)
        ]
        return [one.result() for one in running]


def _joined(
    function: Callable[..., T], arguments: tuple[Any, ...], address: str, processes: int, process: int, devices: int
) -> T:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    return function(*arguments)


# ---- Making the checkpoints

_SLICECAST = (sys.executable, "-m", "slicecast.convert")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def make_checkpoint(directory: Path, sizes: str) -> None:
    """Writes a source."""
    _run(sys.executable, Path(__file__).with_name("make_checkpoint.py"), "--out", directory, *sizes.split())


def convert(source: Path, output: Path, mesh: Mapping[str, int]) -> None:
    """Converts a source; for a mesh, unless it is empty."""
    where = [f"--hf_model_path={source}", f"--base_output_directory={output}", "--simulated_cpu_devices_count=1"]
    _run(*_SLICECAST, "convert", *where, *(f"--ici_{axis}_parallelism={size}" for axis, size in mesh.items()))


def keep_values(output: Path, directory: Path) -> None:
    """Writes each leaf of a checkpoint to a file of its own, as plain bytes, to compare with."""
    directory.mkdir()
    for path, array in orbax_checkpoint.open_arrays(epath.Path(output)).items():
        array.read().result().tofile(directory / path.replace("/", "."))


def kept_value(values: Path, leaf: Leaf) -> np.ndarray:
    """A leaf that `keep_values` has written."""
    return np.memmap(values / leaf.name, np.dtype(leaf.dtype), "r", shape=leaf.shape)


def model_leaves(source: str) -> list[Leaf]:
    """The leaves of a source."""
    plan = commands.make_plan(Settings(hf_model_path=source), Machine(1, 1, 10**12, None))
    return [planned.leaf for planned in plan.leaves]


def write_as_maxtext(source: str, values: str, output: str) -> None:
    """Writes a checkpoint as MaxText's `save_weights_to_checkpoint` does, with all devices."""
    mesh = Mesh(np.array(jax.devices()), "checkpoint_sharding_axis")

    def placed(array: np.ndarray) -> jax.Array:
        divided = [axis for axis in range(min(array.ndim, 2)) if array.shape[axis] % mesh.size == 0]
        spec = [None] * divided[0] + ["checkpoint_sharding_axis"] if divided else []
        result: jax.Array = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        return result

    tree = orbax_checkpoint.nest({leaf.path: placed(kept_value(Path(values), leaf)) for leaf in model_leaves(source)})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=MAXTEXT_CHUNK_BYTES), tree)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
    checkpointer.save(
        epath.Path(output) / "0" / "items",
        args=ocp.args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=MAXTEXT_CHUNK_BYTES),
    )


# ---- Restoring


def restore(source: str, values: str, mesh: Mapping[str, int], jobs: Sequence[Job]) -> list[Measured]:
    """What this process measures when all of them restore as MaxText does.

    Raises:
        ValueError: If a value is not that of the source.
    """
    rules = axis_rules()
    sizes = {axis: mesh.get(axis, 1) for axis in rules.mesh_axes}
    devices = Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))
    leaves = {leaf.path: leaf for leaf in model_leaves(source)}
    shardings = {
        path: NamedSharding(devices, PartitionSpec(*Sharding(mesh, rules).partition_spec(leaf)))
        for path, leaf in leaves.items()
    }
    target = orbax_checkpoint.nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype), sharding=shardings[path])
            for path, leaf in leaves.items()
        }
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    measured = []
    for job in jobs:
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
        items = epath.Path(job.output) / "0" / "items"
        before, seconds = counters(), []
        for _ in range(job.repetitions):
            restored = None  # Its memory is free before the next is read.
            begun = time.perf_counter()
            restored = checkpointer.restore(items, item=target, transforms={}, restore_args=restore_args)
            seconds.append(time.perf_counter() - begun)
        bytes_read, requests = (
            (after - earlier) // job.repetitions for earlier, after in zip(before, counters(), strict=True)
        )
        needed = 0
        for path, leaf in leaves.items():
            array = functools.reduce(lambda tree, key: tree[key], path.split("/"), restored)
            expected = kept_value(Path(values), leaf)
            for index, shard in {str(shard.index): shard for shard in array.addressable_shards}.items():
                needed += shard.data.nbytes
                if np.asarray(shard.data).tobytes() != expected[shard.index].tobytes():
                    raise ValueError(f"{job.layout}: '{path}' at {index} is not what the source gives")
        measured.append(Measured(needed, bytes_read, requests, seconds))
    return measured


def counters() -> tuple[int, int]:
    """The bytes that TensorStore has read from files in this process, and in how many reads."""
    bytes_read, requests = (
        sum(value["value"] for metric in ts.experimental_collect_matching_metrics(name) for value in metric["values"])
        for name in ("/tensorstore/kvstore/file/bytes_read", "/tensorstore/kvstore/file/batch_read")
    )
    return bytes_read, requests


if __name__ == "__main__":
    main(sys.argv[1:])
