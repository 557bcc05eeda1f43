"""What a plan says that a conversion will take, against conversions: bytes, requests, memory; and how it says it."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import published
import published_models
import pytest
import stored
import tiny_models
from etils import epath
from hub import Hub
from program import TIMEOUT_SECONDS

from slicecast.configs import families, slices
from slicecast.configs.hosts import CPU_HOSTS, Host
from slicecast.convert import commands, describe, pipeline
from slicecast.convert import estimate as estimating
from slicecast.convert import plan as planning
from slicecast.convert.chunk_store import ChunkFormat, ChunkWriter
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import BudgetError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.target import FP8, Layout
from slicecast.convert.memory import GB, Machine
from slicecast.convert.pipeline import Pipeline
from slicecast.convert.plan import Plan
from slicecast.convert.settings import Settings


def mxfp4_experts(directory: Path) -> Path:
    """A tiny gpt-oss whose experts are stored as the release stores them."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "quantization_config": published.GPT_OSS}
    config = tiny_models.CONFIGS["gpt-oss"] | sizes
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (dtype, values) in tiny_models.tensors(families.recognize(config), 0).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = (dtype, values)
            continue
        experts, inputs, outputs = values.shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = ("U8", rng.integers(0, 256, (*groups, 16), np.uint8))
        tensors[f"{name}_scales"] = ("U8", rng.integers(110, 125, groups, np.uint8))
    return stored.write(directory, tensors, config)


@pytest.fixture(scope="module")
def sources(
    make_checkpoint: Callable[..., Path], kimi: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Five models in four formats."""
    directory = tmp_path_factory.mktemp("estimate")
    return {
        "Llama": llama,
        "Qwen3-MoE": tiny_models.write(directory / "qwen", "qwen3 moe"),
        "DeepSeek FP8": make_checkpoint(family="deepseek-fp8"),
        "Kimi INT4": kimi,
        "gpt-oss MXFP4": mxfp4_experts(directory / "gpt-oss"),
    }


MODELS = ("Llama", "Qwen3-MoE", "DeepSeek FP8", "Kimi INT4", "gpt-oss MXFP4")


# ---- Against conversions


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_requests_are_those_of_the_run(
    slicecast: Any, sources: dict[str, Path], tmp_path: Path, name: str, processes: int
) -> None:
    """Each process of a conversion on eight devices reads and writes what the plan says, to the byte."""
    common = [f"--hf_model_path={sources[name]}", "--host_memory_gb=1"]
    devices = f"--simulated_cpu_devices_count={8 // processes}"
    printed = slicecast.run("plan", *common, devices, f"--hosts={processes}", "--json").stdout
    expected = json.loads(printed)
    done = slicecast.run_processes(
        *common, f"--base_output_directory={tmp_path / 'output'}", "--log_json", processes=processes
    )
    assert len(expected["estimate"]["per_host"]) == processes
    for of_run, of_plan in zip(done, expected["estimate"]["per_host"], strict=True):
        events = [json.loads(line) for line in of_run.stderr.splitlines() if line.startswith("{")]
        waves = [event for event in events if event["event"] == "wave"]
        (end,) = [event for event in events if event["event"] == "end"]
        assert len(waves) == of_plan["waves"]
        assert sum(wave["in_bytes"] for wave in waves) == of_plan["in_bytes"]
        assert sum(wave["written_bytes"] for wave in waves) == of_plan["out_bytes"]
        assert end["requests"] == of_plan["requests"]
    totals = [sum(host[key] for host in expected["estimate"]["per_host"]) for key in ("in_bytes", "out_bytes")]
    assert totals == [expected["in_bytes"], expected["out_bytes"]]


# A budget for each that makes several waves, and lets as many in as may be in flight.
BUDGETS = {"Llama": 30_000_000, "Qwen3-MoE": 300_000, "DeepSeek FP8": 10_000_000, "Kimi INT4": 10_000_000}
BUDGETS |= {"gpt-oss MXFP4": 3_000_000}


@pytest.mark.parametrize("name", MODELS)
def test_bytes_in_flight_are_those_of_the_run(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The neighbors that need most, held until all are in memory, take what the plan says: the gate counts them."""
    plan = plan_of(sources[name], Machine(1, 1, BUDGETS[name], None))
    (waves,) = plan.waves
    windows = [waves[i : i + plan.waves_in_flight] for i in range(len(waves))]
    largest = max(windows, key=lambda window: sum(wave.host_bytes(plan.machine) for wave in window))
    assert len(largest) > 2
    together = threading.Barrier(len(largest))
    inside, peak, lock = 0, 0, threading.Lock()
    admit = pipeline._MemoryGate.admit

    @contextmanager
    def recorded(gate: Any, nbytes: int) -> Iterator[None]:
        nonlocal inside, peak
        with admit(gate, nbytes):
            with lock:
                inside += nbytes
                peak = max(peak, inside)
            yield
            with lock:
                inside -= nbytes

    def wait_for_the_others() -> None:
        together.wait(TIMEOUT_SECONDS)

    monkeypatch.setattr(pipeline._MemoryGate, "admit", recorded)
    running = Pipeline(replace(plan, waves=(largest,)), 0, jax.local_devices()[:1], lambda _: None, wait_for_the_others)
    arrays = [pipeline.array_spec(leaf) for leaf in plan.leaves]
    running.run(
        ChunkWriter(epath.Path(tmp_path), arrays, 0, writes_metadata=True, chunk_format=ChunkFormat(), plan="test")
    )
    assert peak == plan.host_bytes_in_flight <= BUDGETS[name]
    assert running.reader.bytes_read == sum(wave.in_bytes for wave in largest)


def plan_of(source: Path, machine: Machine) -> Plan:
    return commands.make_plan(Settings(hf_model_path=str(source)), machine)


def test_the_hub_is_asked_for_headers_alone(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """All of Kimi-K2.6, 594 GB in 64 files: the headers and the index are read, each byte once."""
    source = make_checkpoint(headers_only=True, files=64)
    folder = tmp_path / "hub" / "org" / "kimi"
    folder.mkdir(parents=True)
    (folder / "main").symlink_to(source)
    hub = Hub(tmp_path / "hub")
    try:
        done = hub.run("plan", "--hf_model_path=org/kimi", "--slice=v5e-16", "--json")
        log = hub.log()
    finally:
        hub.close()
    facts = json.loads(done.stdout)
    assert facts["estimate"]["traffic"] == "from the internet"
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", found) for method, _, found, _ in log if method == "GET" and found]
    asked = sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)
    assert asked == sum(header_bytes(file) for file in source.iterdir())
    assert asked < facts["in_bytes"] / 10_000
    # One to look each file up, and for each file that holds tensors two reads.
    assert len(log) <= 4 * 66


def header_bytes(file: Path) -> int:
    """What must be read of a file to plan."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    with file.open("rb") as content:
        return 8 + int.from_bytes(content.read(8), "little")


# ---- Pure


def published_plan(name: str, machine: Machine, save_dtype: str = "bfloat16") -> Plan:
    checkpoint = published_models.checkpoint(name)
    model = families.recognize(checkpoint.config)
    quantization = quantization_config.read(checkpoint.config, {})
    layout = Layout(True, save_dtype=save_dtype)
    resolved, ignored = resolve.resolve(checkpoint, model, layout, quantization)
    return planning.make(checkpoint, model, layout, "", resolved, ignored, machine)


def machine_of(name: str) -> Machine:
    return commands.machine_for_planning(Settings(hf_model_path="x", slice=name))


@pytest.fixture(scope="module")
def gpt_oss() -> Plan:
    """gpt-oss-120b on v5e-16."""
    return published_plan("gpt-oss-120b", machine_of("v5e-16"))


def test_more_hosts_take_less_time(gpt_oss: Plan) -> None:
    seconds = [
        estimating.estimate(planning.for_machine(gpt_oss, machine_of(name))).seconds
        for name in ("v5e-16", "v5e-32", "v5e-64")
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 2 * seconds[-1]


def test_stages_are_bytes_over_rates(gpt_oss: Plan) -> None:
    """With rates that can be computed by hand: those of PCIe, of the chips, and of the network where it is slow."""
    slow = replace(slices.parse("v5e-16").host, network_gb_per_second=0.1)
    estimate = estimating.estimate(replace(gpt_oss, machine=replace(gpt_oss.machine, host=slow)))
    for waves, host in zip(gpt_oss.waves, estimate.hosts, strict=True):
        seconds = {stage.name: stage.seconds for stage in host.stages}
        moved = sum(
            work.costs.prepared_bytes + work.costs.out_bytes
            for wave in waves
            for work in wave.boxes
            if work.costs.on_device
        )
        assert seconds["transfer"] == pytest.approx(moved / (4 * 15 * GB))
        assert seconds["decode"] == pytest.approx(3 * moved / (4 * 819 * GB))
        assert seconds["read"] == pytest.approx(host.in_bytes / (0.1 * GB))
        assert seconds["write"] == pytest.approx(host.stored_bytes / (0.1 * GB))
        assert host.bottleneck in ("network in", "network out")
        assert max(seconds.values()) < host.seconds < sum(seconds.values())


def test_stages_that_share_the_processors_add_up(gpt_oss: Plan) -> None:
    """On one processor, decoding and compressing are the bottleneck together."""
    alone = Host("one processor", 1, 64, None)
    estimate = estimating.estimate(planning.for_machine(gpt_oss, Machine.of(alone, 1)))
    (host,) = estimate.hosts
    assert host.bottleneck == "processors"
    assert host.seconds >= sum(stage.seconds for stage in host.stages if stage.resource == "processors")
    assert estimate.chip_hours == 0
    assert estimate.host_hours == pytest.approx(estimate.seconds / 3600)


def test_compression_depends_on_the_format(gpt_oss: Plan) -> None:
    """Experts of gpt-oss have few different values; unquantized weights have many."""
    assert 0.36 < estimating.estimate(gpt_oss).stored_bytes / gpt_oss.out_bytes < 0.45
    dense = published_plan("llama3.1-8b", machine_of("v5e-16"))
    assert estimating.estimate(dense).stored_bytes / dense.out_bytes == pytest.approx(0.78, rel=1e-3)
    widened = published_plan("llama3.1-8b", machine_of("v5e-16"), "float32")
    assert estimating.estimate(widened).stored_bytes == pytest.approx(estimating.estimate(dense).stored_bytes, rel=1e-3)
    kept = published_plan("qwen3.5-35b-a3b-fp8", machine_of("v5e-16"), FP8)
    assert 0.78 < estimating.estimate(kept).stored_bytes / kept.out_bytes < 0.82


def test_another_machine_gets_the_plan_that_is_made_for_it(gpt_oss: Plan) -> None:
    for name in ("v5e-64", "n2-standard-32"):
        moved = planning.for_machine(gpt_oss, machine_of(name))
        made = published_plan("gpt-oss-120b", machine_of(name))
        assert moved.digest == made.digest == gpt_oss.digest
        assert moved.device_slots == made.device_slots
        assert [[len(wave.boxes) for wave in waves] for waves in moved.waves] == [
            [len(wave.boxes) for wave in waves] for waves in made.waves
        ]


def test_the_smallest_machines(gpt_oss: Plan) -> None:
    found = estimating.smallest_slice(gpt_oss, "v5e")
    assert found is not None
    assert found[0] == "v5e-1"
    found = estimating.smallest_cpu_host(gpt_oss)
    assert found is not None
    assert found[0] == min(CPU_HOSTS.values(), key=lambda host: host.memory_gb).name
    # 234 GB of weights: 16 chips of 16 GB hold them, 8 do not; 95 GB a chip.
    assert estimating.smallest_slice_to_load(gpt_oss, "v5e") == "v5e-16"
    assert estimating.smallest_slice_to_load(gpt_oss, "v5p") == "v5p-8"


def test_what_is_too_small_is_passed_over(gpt_oss: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, enough = Host("tiny", 1, 0.001, 1), Host("enough", 1, 16, 1)
    with pytest.raises(BudgetError):
        planning.for_machine(gpt_oss, Machine.of(tiny, 1))
    monkeypatch.setattr(estimating, "CPU_HOSTS", {"tiny": tiny, "enough": enough})
    found = estimating.smallest_cpu_host(gpt_oss)
    assert found is not None
    assert found[0] == "enough"
    monkeypatch.setattr(estimating, "CPU_HOSTS", {"tiny": tiny})
    assert estimating.smallest_cpu_host(gpt_oss) is None


def test_nothing_is_estimated_where_nobody_asks(gpt_oss: Plan) -> None:
    """As in `convert`, whose plan is printed too."""
    unknown = replace(gpt_oss, machine=replace(gpt_oss.machine, host=None))
    assert describe.as_json(unknown)["estimate"] is None


def test_for_people(slicecast: Any, sources: dict[str, Path]) -> None:
    done = slicecast.run("plan", f"--hf_model_path={sources['Kimi INT4']}", "--slice=v5e-16")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith(" "))
    assert re.fullmatch(r".* in and about .* out a host, compressed; \d+ reads", lines["traffic"])
    assert re.fullmatch(
        r"about \d+ s on 4 x ct5lp-hightpu-4t, an estimate, not measured on a TPU; the bottleneck: .*", lines["time"]
    )
    assert lines["smallest"].startswith("v5e-1 in about ")
    assert all(stage in lines["stages"] for stage in ("read", "prepare", "transfer", "decode", "compress", "write"))
    assert "chip-hours" in lines["cost"]


def test_a_cpu_host_has_no_chips(slicecast: Any, sources: dict[str, Path]) -> None:
    words = ["plan", f"--hf_model_path={sources['Kimi INT4']}", "--json"]
    facts = json.loads(slicecast.run(*words, "--slice=n2-standard-32").stdout)
    assert facts["host_budget_bytes"] == 96 * GB
    assert facts["device_budget_bytes"] is None
    assert facts["estimate"]["chip_hours"] == 0
    assert "transfer" not in [stage["stage"] for stage in facts["estimate"]["stages_of_slowest_host"]]
    here = json.loads(slicecast.run(*words, "--host_memory_gb=2", "--hosts=3").stdout)
    assert here["estimate"]["host"] == "this machine"
    assert len(here["estimate"]["per_host"]) == here["hosts"] == 3
