"""Compares what `plan` says with what conversions do, for five models on a mesh of eight simulated devices.

    .venv/bin/python scripts/bench_plan.py --work_dir DIR

The models have the true widths of published ones, few layers, and few experts. Each is converted in a process of its
own. Fails if bytes read, requests, bytes stored or the peak of resident memory is more than 10 % off the plan, on the
mean of a few runs: peaks differ by 15 % from run to run. Prints seconds too, which on a machine that others use say
little, and with `--stages` the core-seconds of each stage, from which the constants of `convert/estimate.py` come.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import make_checkpoint
import ml_dtypes
import numpy as np

from slicecast.convert import allocator

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import published_models

DEVICES = 8
BUDGET_GB = 2
TOLERANCE = 0.1

# The figures that must be right.
COMPARED = ("in_bytes", "requests", "stored_bytes", "peak_bytes")

# By name: the published headers, and how many layers and experts are kept. Kimi-K2.6 is `make_checkpoint.py`'s.
MODELS: dict[str, tuple[str, int, int] | None] = {
    "Llama-3.1-8B": ("llama3.1-8b", 8, 0),
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", 3, 128),
    "DeepSeek-V3, FP8": ("deepseek3-671b", 4, 16),
    "Kimi-K2.6, INT4": None,
    "gpt-oss-20b, MXFP4": ("gpt-oss-20b", 2, 32),
}
VOCABULARY = 16_384

# Runs in a process of its own.
_CHILD = """
import dataclasses, json, sys, time, types
from collections import Counter
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from rich.console import Console
from slicecast.configs.hosts import Host
from slicecast.convert import conversion, pipeline
from slicecast.convert.estimate import estimate
from slicecast.convert.progress import peak_resident_bytes, resident_bytes
from slicecast.convert.settings import Settings
jax.local_devices()
found, stages = {"base": resident_bytes()}, Counter()
def describe(plan):
    if sys.argv[5] == "stages":  # One wave at a time, and the clock is the processors'.
        object.__setattr__(plan, "waves_in_flight", 1)
        pipeline.time = types.SimpleNamespace(monotonic=time.process_time)
    host = Host("this machine", 2, 0, None)
    planned = estimate(dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, host=host)))
    found["plan"] = {"in_bytes": plan.in_bytes, "out_bytes": plan.out_bytes, "requests": planned.requests,
                     "stored_bytes": planned.stored_bytes, "peak_bytes": planned.peak_host_bytes,
                     "objects": planned.objects, "seconds": planned.seconds}
def echo(event):
    if event["event"] == "wave":
        stages.update(event["seconds"])
settings = Settings(hf_model_path=sys.argv[1], base_output_directory=sys.argv[2], host_memory_gb=float(sys.argv[4]))
done = conversion.convert(settings, Console(quiet=True), describe=describe, echo=echo)
print(json.dumps(found | {"in_bytes": done.in_bytes, "requests": done.requests, "peak_bytes": peak_resident_bytes(),
                          "seconds": done.seconds, "stages": stages}))
"""


def main() -> int:
    """Runs all models; returns 1 if a figure is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a directory with 12 GB free, for temporary files")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--stages", action="store_true", help="measure the processor's time of each stage instead")
    arguments = parser.parse_args()
    off = False
    for name in arguments.models:
        source, output = arguments.work_dir / "hf", arguments.work_dir / "maxtext"
        shutil.rmtree(source, ignore_errors=True)
        write(name, source)
        runs = [convert(source, output, "stages" if arguments.stages else "") for _ in range(arguments.runs)]
        shutil.rmtree(source)
        plan = runs[0]["plan"]
        if arguments.stages:
            gb = {"read": plan["in_bytes"], "compute": plan["out_bytes"], "write": plan["out_bytes"]}
            least = {stage: min(run["stages"][stage] for run in runs) / gb[stage] * 1e9 for stage in gb}
            shares = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in least.items())
            print(f"{name}: core-seconds a GB (of input for read, else of output): {shares}", flush=True)
            continue
        for figure in (*COMPARED, "objects", "seconds"):
            found = [run[figure] for run in runs]
            ratio = statistics.mean(found) / plan[figure]
            print(
                f"{name}: {figure} {plan[figure]:.0f} planned; runs {[round(x) for x in found]}, {ratio:.3f}",
                flush=True,
            )
            off |= figure in COMPARED and abs(ratio - 1) > TOLERANCE
    return int(off)


def convert(source: Path, output: Path, how: str) -> dict[str, Any]:
    """Converts in a process of its own, and returns what it measured."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", _CHILD, str(source), str(output), str(DEVICES), str(BUDGET_GB), how]
    environment = os.environ | allocator.SETTINGS
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    files = [file for file in output.rglob("*") if file.is_file()]
    measured |= {"stored_bytes": sum(file.stat().st_size for file in files), "objects": len(files)}
    shutil.rmtree(output)
    return measured


def write(name: str, directory: Path) -> None:
    """Writes the checkpoint of a model, cut."""
    cut = MODELS[name]
    if cut is None:
        sizes = {"layers": 2, "experts": 32, "vocab": VOCABULARY}
        make_checkpoint.write_checkpoint(str(directory), files=4, true_sizes=True, **sizes)
        return
    published, layers, experts = cut
    model = published_models.load(published)
    config = model.config | {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    if "n_routed_experts" in config:
        config["n_routed_experts"] = experts
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    tensors = {}
    for tensor, (dtype, shape) in model.tensors.items():
        layer, expert = re.search(r"\.layers\.(\d+)\.", tensor), re.search(r"\.experts\.(\d+)\.", tensor)
        if (layer and int(layer[1]) >= layers) or (expert and int(expert[1]) >= experts):
            continue
        first = {model.config["vocab_size"]: VOCABULARY, model.config.get("n_routed_experts"): experts}
        resized = "embed_tokens" in tensor or "lm_head" in tensor or ".mlp.gate." in tensor
        tensors[tensor] = (dtype, (first.get(shape[0], shape[0]), *shape[1:]) if resized else shape)
    write_tensors(directory, config, tensors)


def write_tensors(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Writes a checkpoint of one file, with normally distributed weights."""
    pools = make_pools()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    make_checkpoint.ITEM_BYTES["U8"] = 1
    order = [make_checkpoint.Tensor(name, *stored, pool_of(name, stored[0])) for name, stored in tensors.items()]
    order.sort(key=lambda tensor: -make_checkpoint.ITEM_BYTES[tensor.dtype])  # So that each is aligned.
    with (directory / "model.safetensors").open("wb") as file:
        file.write(make_checkpoint.header(order))
        for number, tensor in enumerate(order):
            make_checkpoint.write_values(file, tensor, number, pools)


def pool_of(name: str, dtype: str) -> str:
    """The kind of values that a tensor has."""
    return "exponents" if name.endswith("_scales") else dtype


def make_pools() -> make_checkpoint.Pools:
    """Normally distributed weights as each dtype stores them, and scales."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(make_checkpoint.POOL_ITEMS, np.float32)
    # Four-bit floats: sign and place among 0, 0.5, 1, 1.5, 2, 3, 4, 6, of weights up to about three deviations.
    codes = np.searchsorted([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.abs(2 * normal)) | (normal < 0) << 3
    arrays = {
        "BF16": (0.02 * normal).astype(ml_dtypes.bfloat16),
        "F32": np.abs(1e-4 * normal) + 1e-5,
        "F8_E4M3": np.clip(100 * normal, -448, 448).astype(ml_dtypes.float8_e4m3fn),
        "U8": (codes | rng.permutation(codes) << 4).astype(np.uint8),
        "exponents": rng.integers(117, 121, make_checkpoint.POOL_ITEMS).astype(np.uint8),
    }
    return {name: array.view(np.uint8).data for name, array in arrays.items()}


if __name__ == "__main__":
    sys.exit(main())
