"""Measures the speed of conversion against its floor, and against MaxText's own script.

    .venv/bin/python scripts/bench_throughput.py --work_dir DIR [--maxtext_python PYTHON]

The floor reads the same bytes and writes the same output with the same codec, in the same waves, with nothing in
between: the output is taken from a finished checkpoint, in memory. Conversion and floor run in turns in one process, so
that the machine's drift hits both; the ratio is the median of the ratios of neighbors.

With `--maxtext_python`, a Python that has MaxText 0.2.5 and torch, MaxText's script converts the same checkpoint too,
in a process of its own (see maxtext_baseline.py). MaxText wants Python 3.12, and torch comes with gigabytes of CUDA
there; but its script runs on 3.11 too. Such a Python is ENV/bin/python after:

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    ENV/bin/pip install jax flax orbax-checkpoint grain safetensors transformers tqdm psutil jaxtyping
    ENV/bin/pip install omegaconf pathwaysutils drjax qwix aqtp
    ENV/bin/pip install --no-deps --ignore-requires-python maxtext==0.2.5
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from etils import epath
from rich.console import Console

from slicecast.convert import allocator, chunk_store, commands, conversion, orbax_checkpoint, pipeline
from slicecast.convert.chunk_store import Block, ChunkFormat, ChunkWriter
from slicecast.convert.pipeline import Pipeline
from slicecast.convert.plan import Plan, WorkBox
from slicecast.convert.settings import Settings


@dataclass(frozen=True)
class Times:
    """What a run took.

    Attributes:
        seconds: By the clock.
        processor: Seconds of all cores together.
    """

    seconds: float
    processor: float


class _Floor(Pipeline):
    """The pipeline with nothing between reading and writing."""

    def __init__(self, plan: Plan, blocks: dict[tuple[str, tuple[int, ...]], Block]):
        super().__init__(plan, 0, jax.local_devices(), lambda _: None, lambda: None)
        self._blocks = blocks

    def _convert(self, work: WorkBox, _: pipeline.Stopwatch) -> Block:
        start, stop = work.leaf.rows(work.box)
        tensors = work.leaf.tensors(work.box)
        self.reader.read([span for tensor in tensors for part in tensor.parts for span in part.spans(start, stop)])
        return self._blocks[work.leaf.leaf.path, work.box.start]


def main() -> int:
    """Runs the benchmark; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a directory with 15 GB free, for temporary files")
    parser.add_argument("--experts", type=int, default=16, help="experts of the one layer that has them (default: 16)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--devices", type=int, default=1, help="simulated devices (default: 1)")
    parser.add_argument("--host_memory_gb", type=float, default=4.0)
    parser.add_argument("--maxtext_python", help="a Python with MaxText 0.2.5 and torch")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    os.environ["JAX_PLATFORMS"] = "cpu"

    source = arguments.work_dir / "hf"
    if not source.exists():
        make_checkpoint(source, arguments.experts)
    settings = Settings(
        hf_model_path=str(source),
        base_output_directory=str(arguments.work_dir / "maxtext"),
        host_memory_gb=arguments.host_memory_gb,
    )
    shutil.rmtree(arguments.work_dir / "maxtext", ignore_errors=True)
    conversion.convert(settings, Console(quiet=True), describe=lambda _: None, echo=lambda _: None)
    plan = commands.make_plan(settings, commands.this_machine(settings))
    blocks = read_output(plan, arguments.work_dir / "maxtext")

    def convert() -> None:
        run(Pipeline(plan, 0, jax.local_devices(), lambda _: None, lambda: None), plan, arguments.work_dir)

    def floor() -> None:
        run(_Floor(plan, blocks), plan, arguments.work_dir)

    ours, floors = in_turns(convert, floor, arguments.runs)
    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(ours, floors, strict=True))
    processor_ratio = statistics.median(a.processor / b.processor for a, b in zip(ours, floors, strict=True))
    gigabytes = plan.out_bytes / 1e9
    print(
        f"{plan.in_bytes / 1e9:.2f} GB in, {gigabytes:.2f} GB out, {arguments.devices} devices, {os.cpu_count()} cores"
    )
    for name, times in (("convert", ours), ("floor", floors)):
        rates = sorted(gigabytes / taken.seconds for taken in times)
        processor = statistics.median(taken.processor for taken in times) / gigabytes
        print(
            f"{name:<8} {statistics.median(rates):.3f} GB/s of output (from {rates[0]:.3f} to {rates[-1]:.3f}), "
            f"{processor:.2f} core-seconds a GB"
        )
    print(f"convert / floor: {ratio:.2f} in time (goal: at most 1.5), {processor_ratio:.2f} in core-seconds")
    met = ratio <= 1.5
    if arguments.maxtext_python:
        seconds = maxtext(arguments.maxtext_python, source, arguments.work_dir / "theirs")
        faster = seconds / statistics.median(taken.seconds for taken in ours)
        print(f"MaxText's script: {gigabytes / seconds:.3f} GB/s; we are {faster:.1f} times faster (goal: at least 10)")
        met = met and faster >= 10
    return 0 if met else 1


def make_checkpoint(directory: Path, experts: int) -> None:
    """Writes a Kimi-K2.6 of true width with two layers, one of them with experts."""
    command = [sys.executable, str(Path(__file__).with_name("make_checkpoint.py")), "--out", str(directory)]
    flags = ["--true_sizes", "--layers", "2", "--experts", str(experts), "--vocab", "4096", "--files", "4"]
    subprocess.run(command + flags, check=True)


def read_output(plan: Plan, output: Path) -> dict[tuple[str, tuple[int, ...]], Block]:
    """All boxes of a finished checkpoint, in memory."""
    arrays = orbax_checkpoint.open_arrays(output)
    return {
        (work.leaf.leaf.path, work.box.start): Block(
            pipeline.array_spec(work.leaf), work.box, arrays[work.leaf.leaf.path][work.box.slices].read().result()
        )
        for work in plan.boxes
    }


def run(work: Pipeline, plan: Plan, work_dir: Path) -> None:
    """Runs a pipeline into an empty directory."""
    directory = work_dir / "chunks"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    arrays = [pipeline.array_spec(leaf) for leaf in plan.leaves]
    work.run(
        ChunkWriter(
            epath.Path(directory), arrays, 0, writes_metadata=True, chunk_format=ChunkFormat(), plan="benchmark"
        )
    )
    assert any(directory.glob(f"{chunk_store.PROCESS_PREFIX}*"))


def in_turns(first: Callable[[], None], second: Callable[[], None], runs: int) -> tuple[list[Times], list[Times]]:
    """The times of each, after a run of each that is not counted."""
    times: dict[Callable[[], None], list[Times]] = {first: [], second: []}
    for turn, function in itertools.product(range(runs + 1), (first, second)):
        start, processor = time.perf_counter(), time.process_time()
        function()
        if turn:
            times[function].append(Times(time.perf_counter() - start, time.process_time() - processor))
    return times[first], times[second]


def maxtext(python: str, source: Path, output: Path) -> float:
    """Seconds that MaxText's script takes, on the same checkpoint."""
    shutil.rmtree(output, ignore_errors=True)
    command = [python, str(Path(__file__).with_name("maxtext_baseline.py")), str(source), str(output)]
    # What the script logs goes to stderr; with KEEP_COLLECTIONS it runs exactly as a user runs it.
    environment = os.environ | {"KEEP_COLLECTIONS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    taken = json.loads(done.stdout.splitlines()[-1])
    print(f"MaxText's script: {taken['seconds']:.1f} s, {taken['processor']:.1f} s of all cores", end=", ")
    print(f"peak memory {taken['peak'] / 1e9:.2f} GB")
    return float(taken["seconds"])


if __name__ == "__main__":
    allocator.restart()
    sys.exit(main())
