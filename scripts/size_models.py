"""Writes what ten well-known models need, and how long they take on some machines: docs/sizing.md, README.md's table.

    .venv/bin/python scripts/size_models.py

Everything is planned at full size, from headers: those in `tests/data/models`, and those that `make_checkpoint.py`
writes for Kimi-K2.6. Prints how long each plan took.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slicecast.configs import families
from slicecast.configs.hosts import CPU_HOSTS
from slicecast.configs.slices import parse
from slicecast.convert import estimate as estimating
from slicecast.convert import plan as planning
from slicecast.convert.codecs import quantization_config
from slicecast.convert.describe import duration
from slicecast.convert.estimate import Estimate
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import GB, Machine
from slicecast.convert.plan import Plan
from slicecast.convert.source.checkpoint import Checkpoint, open_checkpoint

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "sizing.md"
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT / "tests"))

import published_models  # noqa: E402  It is found in `tests` only.

SLICES = ("v5e-16", "v5e-64", "v5e-256")
CPU_HOST = "n2-standard-32"

# What people call them, and MaxText's names, by which their headers are filed. Kimi-K2.6 has its own.
MODELS = {
    "Kimi-K2.6": None,
    "DeepSeek-V3": "deepseek3-671b",
    "Qwen3-480B (Coder)": "qwen3-480b-a35b",
    "Llama-3.1-405B": "llama3.1-405b",
    "Qwen3-235B": "qwen3-235b-a22b",
    "gpt-oss-120b": "gpt-oss-120b",
    "Llama-3.1-70B": "llama3.1-70b",
    "Gemma-3-27B": "gemma3-27b",
    "gpt-oss-20b": "gpt-oss-20b",
    "Llama-3.1-8B": "llama3.1-8b",
}

TEXT = """# Sizing

What ten well-known models need, planned at full size from their headers. `slicecast plan` says the same of any model
and machine. `scripts/size_models.py` writes this page.

{table}

* `in`: bytes read. `out`: bytes of the result before compression. `stored`: about what is written.
* Under each machine: about how long a conversion takes, and about the most memory that a host uses, the program's own
  {base_gb:.2f} GB included. A v5e host has 192 GB, {cpu_host} 128 GB: memory is not what to choose a machine by.
* `chip`: the most memory of a chip in use, of 16 GB.
* `loads on`: the smallest v5e slice whose chips hold the weights alone. To train or serve takes more.
* Any of these models converts on a single {smallest} too, with {smallest_gb:.0f} GB of memory.

Bytes read and requests are exact: `convert` carries out this very plan. Stored bytes and memory are expected ones; for
five models the means of three runs were within 10 % of them (`scripts/bench_plan.py`). Times are estimates, and
**not measured on a TPU**: the largest of what the network, PCIe, chips and processors need, each by its published or
measured rate. The constants and their sources are in `convert/estimate.py`. In all of these, writing to the bucket is
the bottleneck, at the 0.55 GB/s a host that Orbax publishes.
"""


@dataclass(frozen=True)
class Row:
    """A model, and its estimates by machine."""

    name: str
    plan: Plan
    estimates: dict[str, Estimate]
    device_bytes: int


def checkpoints(kimi: Path) -> Iterator[tuple[str, Checkpoint]]:
    """The models' headers; `kimi` has those of Kimi-K2.6."""
    for name, maxtext_name in MODELS.items():
        yield name, open_checkpoint(str(kimi)) if maxtext_name is None else published_models.checkpoint(maxtext_name)


def row(name: str, checkpoint: Checkpoint) -> Row:
    """A model planned for all machines."""
    model = families.recognize(checkpoint.config)
    quantization = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    layout = Layout(scan_layers=True)
    resolved, ignored = resolve.resolve(checkpoint, model, layout, quantization)
    machines = {of.name: Machine.of(of.host, of.hosts) for of in map(parse, SLICES)}
    machines[CPU_HOST] = Machine.of(CPU_HOSTS[CPU_HOST], 1)
    plan = planning.make(checkpoint, model, layout, "", resolved, ignored, machines[SLICES[0]])
    plans = {machine: planning.for_machine(plan, of) for machine, of in machines.items()}
    estimates = {machine: estimating.estimate(of) for machine, of in plans.items()}
    return Row(name, plan, estimates, max(plans[name].device_bytes_in_flight for name in SLICES))


def document(kimi: Path) -> tuple[str, str]:
    """The page, and its table."""
    rows = []
    for name, checkpoint in checkpoints(kimi):
        start = time.perf_counter()
        rows.append(row(name, checkpoint))
        print(f"{name}: planned for {len(rows[-1].estimates)} machines in {time.perf_counter() - start:.1f} s")
    smallest = {found[0] for found in map(estimating.smallest_cpu_host, (each.plan for each in rows)) if found}
    assert len(smallest) == 1, "The page says that one machine does for all."
    host = CPU_HOSTS[smallest.pop()]
    bottlenecks = {estimate.slowest.bottleneck for each in rows for estimate in each.estimates.values()}
    assert bottlenecks == {"network out"}, "The page says so."
    lines = "\n".join(table(rows))
    page = TEXT.format(
        table=lines,
        base_gb=estimating.BASE_HOST_BYTES / GB,
        cpu_host=CPU_HOST,
        smallest=host.name,
        smallest_gb=host.memory_gb,
    )
    return page, lines


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table."""
    titles = ["model", "in", "out", "stored", "reads", *SLICES, "chip", CPU_HOST, "loads on"]
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join('---' for _ in titles)} |"
    for each in rows:
        first = each.estimates[SLICES[0]]
        cells = [
            each.name,
            *(f"{nbytes / GB:.0f} GB" for nbytes in (each.plan.in_bytes, each.plan.out_bytes, first.stored_bytes)),
            f"{first.requests}",
            *(_cell(each.estimates[name]) for name in SLICES),
            f"{each.device_bytes / GB:.1f} GB",
            _cell(each.estimates[CPU_HOST]),
            estimating.smallest_slice_to_load(each.plan, "v5e") or "none",
        ]
        yield f"| {' | '.join(cells)} |"


def _cell(estimate: Estimate) -> str:
    return f"{duration(estimate.seconds)}, {estimate.peak_host_bytes / GB:.0f} GB"


def main() -> None:
    """Writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        kimi = Path(folder) / "kimi"
        script = ROOT / "scripts" / "make_checkpoint.py"
        subprocess.run([sys.executable, script, "--out", kimi, "--headers_only", "--files", "64"], check=True)
        page, lines = document(kimi)
    before = DOCUMENT.read_text()
    (old,) = re.findall(r"(?:^\|.*\n)+", before, re.M)
    DOCUMENT.write_text(page)
    README.write_text(README.read_text().replace(old.strip(), lines))


if __name__ == "__main__":
    main()
