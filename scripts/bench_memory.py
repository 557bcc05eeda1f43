"""Measures the peak memory of conversions: flat, and within the budget.

    .venv/bin/python scripts/bench_memory.py --work_dir DIR

Converts Kimi-K2.6, or with `--family=deepseek-fp8` DeepSeek-V3 as it is published, at true width (7168, 2048) with 8,
32 and 96 experts, scanned and unscanned, under `--host_memory_gb=1`, each in a process of its own, and prints the peak
resident memory over what the process holds after its imports. Fails if a peak is above the budget plus 0.5 GiB, or if
it grows with the model: by more than 5 % of what the output grows by. It may grow a little, for with more experts a box
holds more of them, up to a limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slicecast.convert import allocator

BUDGET_GB = 1
# What XLA's and TensorStore's own buffers, and the allocator's slack, may take beside the bytes in flight.
ALLOWANCE_BYTES = 1 << 29
EXPERTS = (8, 32, 96)
# A conversion that kept any part of the model would grow by more than this part of its output.
GROWTH = 0.05

# Runs in a process of its own. Resetting the peak after the imports leaves only what the conversion takes.
_CHILD = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
from rich.console import Console
from slicecast.convert import conversion
from slicecast.convert.progress import peak_resident_bytes, resident_bytes
from slicecast.convert.settings import Settings
jax.local_devices()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
base = resident_bytes()
settings = Settings(hf_model_path=sys.argv[1], base_output_directory=sys.argv[2], scan_layers=sys.argv[3] == "scanned",
                    host_memory_gb=float(sys.argv[5]))
result = {"base": base}
done = conversion.convert(
    settings, Console(quiet=True), describe=lambda plan: result.update(out_bytes=plan.out_bytes), echo=lambda _: None
)
print(json.dumps(result | {"peak": peak_resident_bytes(), "seconds": done.seconds}))
"""


def main() -> int:
    """Runs all cases; returns 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a directory with 20 GB free, for temporary files")
    parser.add_argument("--devices", type=int, default=1, help="simulated devices (default: 1)")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--family", choices=("kimi-k2.6", "deepseek-fp8"), default="kimi-k2.6")
    arguments = parser.parse_args()

    table = Table("experts", "layers", "output GB", "seconds", "base GB", "peak over base GB")
    outputs: list[int] = []
    peaks: dict[str, list[int]] = {"scanned": [], "unscanned": []}
    for experts in arguments.experts:
        source, output = arguments.work_dir / "hf", arguments.work_dir / "maxtext"
        make_checkpoint(source, arguments.family, experts)
        for layers, layer_peaks in peaks.items():
            result = convert(source, output, layers, arguments.devices)
            shutil.rmtree(output)
            over = result["peak"] - result["base"]
            layer_peaks.append(over)
            outputs.append(result["out_bytes"])
            table.add_row(
                str(experts),
                layers,
                f"{result['out_bytes'] / 1e9:.2f}",
                f"{result['seconds']:.1f}",
                f"{result['base'] / 1e9:.2f}",
                f"{over / 1e9:.2f}",
            )
        shutil.rmtree(source)
    Console().print(table)

    bound = BUDGET_GB * 10**9 + ALLOWANCE_BYTES
    within = all(peak <= bound for layer_peaks in peaks.values() for peak in layer_peaks)
    growth = max(layer_peaks[-1] - layer_peaks[0] for layer_peaks in peaks.values())
    flat = growth <= GROWTH * (outputs[-1] - outputs[0])
    print(f"bound {bound / 1e9:.2f} GB: {'kept' if within else 'BROKEN'}; flat: {'yes' if flat else 'NO'}")
    return 0 if within and flat else 1


def make_checkpoint(directory: Path, family: str, experts: int) -> None:
    """Writes a checkpoint of true width with two layers, one of them with experts."""
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, str(Path(__file__).with_name("make_checkpoint.py")), "--out", str(directory)]
    flags = ["--family", family, "--true_sizes", "--layers", "2", "--dense_layers", "1", "--experts", str(experts)]
    flags += ["--vocab", "4096", "--files", "4"]
    subprocess.run(command + flags, check=True)


def convert(source: Path, output: Path, layers: str, devices: int) -> dict[str, Any]:
    """Converts in a process of its own, and returns what it measured."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", _CHILD, str(source), str(output), layers, str(devices), str(BUDGET_GB)]
    environment = os.environ | allocator.SETTINGS
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    sys.exit(main())
