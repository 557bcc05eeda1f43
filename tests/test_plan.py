"""Plans: every chunk and every source byte once, in bounded memory, and all of Kimi-K2.6 in seconds."""

import functools
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from headers import infos
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import QUANTIZED, SAMPLES

from slicecast.configs import families, maxtext
from slicecast.convert import plan as planning
from slicecast.convert import tiles
from slicecast.convert.box import Box, grid_size
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import BudgetError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.ops import Scale, Transpose
from slicecast.convert.mapping.rules import Model, ModelOptions
from slicecast.convert.mapping.target import Layout
from slicecast.convert.memory import (
    BOX_SHARE_OF_BUDGET,
    MAX_BOX_BYTES,
    MAX_DEVICE_SLOTS,
    MAX_WAVES_IN_FLIGHT,
    Costs,
    Machine,
    chips_used,
    row_shares,
)
from slicecast.convert.plan import Plan
from slicecast.convert.source.checkpoint import Checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.safetensors_header import TensorInfo

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"
GB = 10**9
HOST = Machine(hosts=1, devices=1, host_bytes=16 * GB, device_bytes=None)
SLICE = Machine(hosts=4, devices=4, host_bytes=100 * GB, device_bytes=12 * GB)
WEIGHT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def make_source(family: str, *, true_sizes: bool = False, files: int = 3, **sizes: int) -> Checkpoint:
    """A checkpoint as `open_checkpoint` would find it, without the files."""
    config = script.make_config(family, sizes, true_sizes)
    tensors, file_sizes = {}, {}
    for number, part in enumerate(script.split(script.all_tensors(config), files)):
        file, offset = f"model-{number}.safetensors", 1000
        for tensor in part:
            tensors[tensor.name] = TensorInfo(tensor.name, file, tensor.dtype, tensor.shape, offset, tensor.nbytes)
            offset += tensor.nbytes
        file_sizes[file] = offset
    return Checkpoint(Directory("/models/here"), config, dict(sorted(tensors.items())), file_sizes)


def make_plan(
    source: Checkpoint,
    machine: Machine = HOST,
    layout: Layout = Layout(True),  # noqa: B008
    model: Model | None = None,
) -> Plan:
    model = model or families.recognize(source.config)
    announced = quantization_config.read(source.config)
    resolved, ignored = resolve.resolve(source, model, layout, announced)
    return planning.make(source, model, layout, "", resolved, ignored, machine)


TINY: dict[str, tuple[str, dict[str, int]]] = {
    "kimi": ("kimi-k2.6", {}),
    "odd kimi": (
        "kimi-k2.6",
        {"layers": 5, "experts": 7, "hidden": 96, "moe_intermediate": 32, "vocab": 331, "heads": 3},
    ),
    "deepseek": ("deepseek", {"layers": 4, "dense_layers": 2, "hidden": 100, "heads": 5, "vocab": 509}),
    "v2-lite": ("deepseek-v2-lite", {"experts": 5}),
    "llama": ("llama", {"layers": 5, "hidden": 120, "heads": 6, "kv_heads": 3, "vocab": 509}),
    "one head": ("llama", {"layers": 2, "hidden": 64, "heads": 1, "kv_heads": 1, "vocab": 50}),
}
LAYOUTS = [Layout(True), Layout(True, 0, "float32"), Layout(False)]


@functools.cache
def tiny(name: str) -> Checkpoint:
    family, sizes = TINY[name]
    return make_source(family, true_sizes=False, files=3, **sizes)


@functools.cache
def wide(name: str) -> Checkpoint:
    """Two or three layers at true width."""
    sizes = {"kimi": ("kimi-k2.6", {"layers": 3, "experts": 8}), "llama": ("llama", {"layers": 2})}
    family, few = sizes[name]
    return make_source(family, true_sizes=True, files=2, **few)


# ---- Every chunk and every byte once


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor that a box reads."""

    name: str
    start: int
    stop: int


def source_parts(plan: Plan) -> Iterator[tuple[Part, int]]:
    """The rows that boxes read, with their bytes."""
    for work in plan.boxes:
        start, stop = work.leaf.rows(work.box)
        for tensor in work.leaf.tensors(work.box):
            for part in tensor.parts:
                yield Part(part.tensor.name, start, stop), sum(span.nbytes for span in part.spans(start, stop))


def check_chunks(plan: Plan) -> None:
    """The boxes of each leaf are whole chunks, each chunk once."""
    chunks: dict[str, set[Box]] = defaultdict(set)
    for work in plan.boxes:
        leaf, tiling = work.leaf.leaf, work.leaf.tiling
        for chunk in work.box.tiles(tiling.chunk):
            for low, high, step, size in zip(chunk.start, chunk.stop, tiling.chunk, leaf.shape, strict=True):
                assert low % step == 0
                assert high == min(low + step, size)
            assert chunk not in chunks[leaf.path]
            chunks[leaf.path].add(chunk)
    for planned in plan.leaves:
        assert (
            len(chunks[planned.leaf.path]) == planned.chunk_count == grid_size(planned.leaf.shape, planned.tiling.chunk)
        )
    assert len(chunks) == len(plan.leaves)


def check_bytes(plan: Plan) -> None:
    """Every row of every used tensor is read once, and the costs say how many bytes that is."""
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    total = 0
    for part, nbytes in source_parts(plan):
        rows[part.name].append((part.start, part.stop))
        total += nbytes
    for name, ranges in rows.items():
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == plan.checkpoint.tensors[name].shape[0]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    used = sum(plan.checkpoint.tensors[name].nbytes for name in rows)
    assert total == used == plan.in_bytes == sum(work.costs.in_bytes for work in plan.boxes)
    for work in plan.boxes:
        assert work.costs.out_bytes == work.box.size * np.dtype(work.leaf.leaf.dtype).itemsize
    sizes = [math.prod(p.leaf.shape) * np.dtype(p.leaf.dtype).itemsize for p in plan.leaves]
    assert plan.out_bytes == sum(sizes) == sum(work.costs.out_bytes for work in plan.boxes)


def check_memory(plan: Plan) -> None:
    """Waves are bounded, and so are all that are in flight."""
    machine = plan.machine
    wave_bytes = min(MAX_BOX_BYTES, machine.host_bytes // BOX_SHARE_OF_BUDGET)
    for waves in plan.waves:
        for wave in waves:
            assert wave.boxes
            assert wave.out_bytes <= wave_bytes or len(wave.boxes) == 1
            # A wave that never fits would wait forever at the pipeline's gate.
            assert wave.host_bytes(machine) <= machine.host_bytes
    for work in plan.boxes:
        column = math.prod(work.leaf.tiling.column) * work.leaf.itemsize
        assert work.costs.out_bytes <= max(wave_bytes, column)
    assert 1 <= plan.waves_in_flight <= MAX_WAVES_IN_FLIGHT
    assert 1 <= plan.device_slots <= MAX_DEVICE_SLOTS
    largest = max(wave.host_bytes(machine) for waves in plan.waves for wave in waves)
    assert largest <= plan.host_bytes_in_flight <= min(machine.host_bytes, plan.waves_in_flight * largest)
    if machine.device_bytes is not None:
        assert plan.device_bytes_in_flight <= machine.device_bytes


def check_shares(plan: Plan) -> None:
    """Runs of the source, of equal bytes within one box."""
    machine = plan.machine
    assert len(plan.waves) == machine.hosts
    order = [work for waves in plan.waves for wave in waves for work in wave.boxes]
    places = []
    for work in order:
        first = work.leaf.sources[next(work.leaf.leaf.coordinates(work.box))].parts[0]
        span = first.spans(*work.leaf.rows(work.box))[0]
        places.append((span.file, span.offset))
    assert places == sorted(places)
    costs = [work.costs.in_bytes + work.costs.out_bytes for work in order]
    for waves in plan.waves:
        share = sum(wave.in_bytes + wave.out_bytes for wave in waves)
        assert abs(share - sum(costs) / machine.hosts) <= max(costs)


def check(plan: Plan) -> None:
    check_chunks(plan)
    check_bytes(plan)
    check_memory(plan)
    check_shares(plan)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("hosts", [1, 3, 16, 500])
def test_tiny_models(name: str, layout: Layout, hosts: int) -> None:
    check(make_plan(tiny(name), replace(HOST, hosts=hosts), layout))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(TINY)),
    st.sampled_from(LAYOUTS),
    st.integers(1, 9),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 10, 100]),
    st.sampled_from([5000, 1 << 14, 1 << 16]),
    st.sampled_from([None, 1]),
)
def test_tiny_models_as_if_they_were_large(
    name: str, layout: Layout, hosts: int, devices: int, budget: int, column_bytes: int, device_bytes: int | None
) -> None:
    """With the constants of the tiling scaled down, so that leaves are cut along all their axes, into many boxes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "COLUMN_BYTES", column_bytes)
        patch.setattr(tiles, "REQUEST_BYTES", column_bytes // 32)
        patch.setattr(tiles, "MAX_CHUNK_BYTES", column_bytes // 4)
        patch.setattr(tiles, "MAX_INNER_BYTES", column_bytes // 16)
        patch.setattr(tiles, "SMALL_BYTES", column_bytes // 8)
        # Enough for the largest column: its source twice, at most of twice its size, and its output three times.
        smallest = 7 * max(math.prod(leaf.tiling.column) * 4 for leaf in make_plan(tiny(name), HOST, layout).leaves)
        host_bytes = budget * smallest
        check(make_plan(tiny(name), Machine(hosts, devices, host_bytes, device_bytes and host_bytes), layout))


@pytest.mark.parametrize("machine", [HOST, SLICE], ids=["host", "slice"])
def test_a_large_model(machine: Machine) -> None:
    plan = make_plan(make_source("llama", true_sizes=True, files=4), machine)
    check(plan)
    assert len(list(plan.boxes)) > 30


def test_boxes_cover_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as `check_chunks`, element by element."""
    monkeypatch.setattr(tiles, "COLUMN_BYTES", 10_000)
    plan = make_plan(tiny("odd kimi"), Machine(3, 2, 400_000, None))
    count = {planned.leaf.path: np.zeros(planned.leaf.shape, np.uint8) for planned in plan.leaves}
    for work in plan.boxes:
        count[work.leaf.leaf.path][work.box.slices] += 1
    assert all((array == 1).all() for array in count.values())
    assert len(list(plan.boxes)) > 2 * len(plan.leaves)


def test_tied_weights_are_read_twice_and_written_twice() -> None:
    source = tiny("llama")
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != "lm_head.weight"}
    tied = replace(source, config={**source.config, "tie_word_embeddings": True}, tensors=tensors)
    plan = make_plan(tied)
    check_chunks(plan)
    embedding = tensors["model.embed_tokens.weight"].nbytes
    assert plan.in_bytes == sum(tensor.nbytes for tensor in tensors.values()) + embedding
    assert plan.out_bytes == make_plan(source).out_bytes


def test_more_hosts_than_boxes() -> None:
    plan = make_plan(tiny("one head"), replace(HOST, hosts=1000))
    assert sum(1 for waves in plan.waves if waves) <= len(list(plan.boxes)) < 1000
    check(plan)


# ---- Every format


QUANTIZED_LINEAR = [name for name in QUANTIZED if name != "mxfp4 gpt-oss"]


def quantized(name: str) -> Checkpoint:
    """A tiny Llama of which the gate and up projections are stored in a format."""
    source = make_source("llama", files=1, layers=3, hidden=64, intermediate=24, heads=2, kv_heads=1, vocab=50)
    tensors = dict(source.tensors)
    ((file, offset),) = source.file_sizes.items()
    for weight in [name for name in tensors if name.endswith((".gate_proj.weight", ".up_proj.weight"))]:
        del tensors[weight]
        for part in infos(SAMPLES[name]).values():
            full = weight.removesuffix("weight") + part.name.removeprefix("m.")
            tensors[full] = replace(part, name=full, file=file, offset=offset)
            offset += part.nbytes
    return replace(source, config={**source.config, **SAMPLES[name].config}, tensors=tensors, file_sizes={file: offset})


@pytest.mark.parametrize("machine", [HOST, SLICE, Machine(2, 8, 30_000, 30_000)], ids=["host", "slice", "small"])
@pytest.mark.parametrize("name", QUANTIZED_LINEAR)
def test_quantized_models(monkeypatch: pytest.MonkeyPatch, name: str, machine: Machine) -> None:
    """Boxes of a few rows each: every stored byte is read, and the costs are the codecs'."""
    monkeypatch.setattr(tiles, "COLUMN_BYTES", 1000)
    monkeypatch.setattr(tiles, "REQUEST_BYTES", 32)
    monkeypatch.setattr(tiles, "SMALL_BYTES", 32)
    plan = make_plan(quantized(name), machine)
    check_chunks(plan)
    check_memory(plan)
    check_shares(plan)
    read = {part: bytearray(info.nbytes) for part, info in plan.checkpoint.tensors.items()}
    for work in plan.boxes:
        start, stop = work.leaf.rows(work.box)
        tensors = work.leaf.tensors(work.box)
        spans = [(part.tensor, span) for t in tensors for part in t.parts for span in part.spans(start, stop)]
        assert work.costs.in_bytes == sum(span.nbytes for _, span in spans)
        prepared = [tensor.codec.prepared_bytes(tensor.parts, stop - start) for tensor in tensors]
        assert work.costs.prepared_bytes == sum(prepared)
        for tensor, span in spans:
            begin = span.offset - tensor.offset
            assert begin >= 0
            assert begin + span.nbytes <= tensor.nbytes
            read[tensor.name][begin : begin + span.nbytes] = b"1" * span.nbytes
    # Each of three layers in two boxes of twelve rows, where memory is small.
    cut = [work for work in plan.boxes if work.leaf.leaf.path.endswith("wi_0/kernel")]
    assert len(cut) == (6 if machine.host_bytes < GB else 1)
    unread = {part for part, seen in read.items() if 0 in seen}
    assert unread == {part for part in plan.checkpoint.tensors if part.endswith("weight_shape")}
    kernels = {"gptq": {"gptq"}, "awq": {"awq"}, "bnb": set(), "mlx": set()}
    assert plan.kernels == kernels.get(name.split()[0], {"grouped"})


def test_rows_that_stay_together_on_a_chip() -> None:
    """AWQ's words of eight rows: 24 rows of three layers are three shares, which eight chips cannot divide evenly."""
    machine = Machine(1, 8, GB, GB)
    for name, chips in (("awq", 1), ("gptq v1", 8), ("fp8 blocks", 8)):
        plan = make_plan(quantized(name), machine)
        (work,) = [work for work in plan.boxes if work.leaf.leaf.path.endswith("wi_0/kernel")]
        assert work.leaf.tiling.row_axis is not None
        assert (len(work.leaf.tensors(work.box)), work.box.shape[work.leaf.tiling.row_axis]) == (3, 24)
        assert planning._device_bytes(work, machine) == work.costs.device_bytes(chips)
    assert (row_shares(24, 8), row_shares(24, 1), row_shares(20, 8), row_shares(None, 8)) == (3, 24, None, None)


def test_what_a_box_costs() -> None:
    """The source as read, or as prepared if that is more; once more for the chips; the output twice or three times."""
    slice_, host = SLICE, HOST
    grown = Costs(in_bytes=100, prepared_bytes=300, out_bytes=1000, on_device=True)
    assert (grown.host_bytes(slice_), grown.host_bytes(host)) == (300 + 300 + 2000, 300 + 300 + 3000)
    shrunk = Costs(in_bytes=300, prepared_bytes=100, out_bytes=1000, on_device=True)
    assert (shrunk.host_bytes(slice_), shrunk.host_bytes(host)) == (300 + 100 + 2000, 300 + 100 + 3000)
    assert (grown.device_bytes(1), grown.device_bytes(4)) == (2300, 575)
    copied = Costs(in_bytes=1000, prepared_bytes=1000, out_bytes=1000, on_device=False)
    assert (copied.host_bytes(slice_), copied.host_bytes(host), copied.device_bytes(4)) == (2000, 2000, 0)


# ---- What needs the chips


def test_copies_need_no_device() -> None:
    plan = make_plan(tiny("kimi"), SLICE)
    for work in plan.boxes:
        leaf = work.leaf.leaf
        (dtype,) = {tensor.parts[0].tensor.dtype for tensor in work.leaf.tensors(work.box)}
        same = {"BF16": "bfloat16", "F32": "float32"}.get(dtype) == leaf.dtype
        is_copy = same and leaf.path.split("/")[-1] in ("scale", "embedding", "bias")
        assert work.costs.on_device == (not is_copy)
        if is_copy:
            assert (
                work.costs.host_bytes(SLICE) == work.costs.in_bytes + work.costs.out_bytes == 2 * work.costs.out_bytes
            )
            assert work.costs.device_bytes(1) == 0
    kinds = {work.leaf.leaf.path.split("/")[-1] for work in plan.boxes if not work.costs.on_device}
    assert kinds == {"scale", "embedding", "bias"}


def test_another_dtype_is_no_copy() -> None:
    """Only the router's bias is float32 already; in float16 nothing is a copy."""
    plan = make_plan(tiny("kimi"), layout=Layout(True, 1, "float32"))
    assert {work.leaf.leaf.path.split("/")[-1] for work in plan.boxes if not work.costs.on_device} == {"bias"}
    source = tiny("llama")
    halves = {name: replace(tensor, dtype="F16") for name, tensor in source.tensors.items()}
    assert all(work.costs.on_device for work in make_plan(replace(source, tensors=halves)).boxes)


@pytest.mark.parametrize("devices", range(1, 17))
def test_chips_share_evenly(devices: int) -> None:
    for batch in range(1, 20):
        for rows in (None, *range(1, 40)):
            over_batch, over_rows = chips_used(batch, rows, devices)
            assert batch % over_batch == 0
            assert (rows or 1) % over_rows == 0
            assert over_batch * over_rows <= devices
            if batch % devices == 0:
                assert (over_batch, over_rows) == (devices, 1)
            if batch == 1 and rows is not None and rows % devices == 0:
                assert (over_batch, over_rows) == (1, devices)


# ---- The digest


def test_the_digest_is_that_of_what_is_written() -> None:
    source = tiny("kimi")
    digests = set()
    for hosts in (1, 2, 7):
        for devices, device_bytes in ((1, None), (8, None), (4, GB), (4, 10 * GB)):
            for budget in (1, 4, 100):
                digests.add(make_plan(source, Machine(hosts, devices, budget * GB, device_bytes)).digest)
    digests.add(make_plan(replace(source, storage=Directory("/elsewhere"))).digest)
    backwards = dict(reversed(list(source.tensors.items())))
    digests.add(make_plan(replace(source, tensors=backwards)).digest)
    assert len(digests) == 1
    (digest,) = digests
    assert re.fullmatch(r"[0-9a-f]{64}", digest)


def test_the_digest_changes_with_all_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("llama")
    model = families.recognize(source.config)
    name = "model.norm.weight"
    moved = {**source.tensors, name: replace(source.tensors[name], offset=8)}
    other_file = {**source.tensors, name: replace(source.tensors[name], file="model-9.safetensors")}
    half = {**source.tensors, name: replace(source.tensors[name], dtype="F16")}
    rules = list(model.rules)
    query = next(i for i, rule in enumerate(rules) if isinstance(rule.ops[-1:], tuple) and Scale in map(type, rule.ops))
    unscaled = replace(rules[query], ops=tuple(op for op in rules[query].ops if not isinstance(op, Scale)))
    renamed = replace(rules[query], target=rules[query].target.replace("query", "q"))
    plans = {
        "itself": make_plan(source),
        "scan": make_plan(source, layout=Layout(False)),
        "axis": make_plan(source, layout=Layout(True, 0)),
        "dtype": make_plan(source, layout=Layout(True, 1, "float32")),
        "config": make_plan(replace(source, config={**source.config, "rms_norm_eps": 1e-3})),
        "side config": make_plan(replace(source, side_configs={"quant_config.json": {}})),
        "file size": make_plan(replace(source, file_sizes={**source.file_sizes, "model-0.safetensors": 1})),
        "offset": make_plan(replace(source, tensors=moved)),
        "file": make_plan(replace(source, tensors=other_file)),
        "stored dtype": make_plan(replace(source, tensors=half)),
        "rotary layout": make_plan(
            source, model=families.recognize(source.config, ModelOptions(model_name="llama3-8b"))
        ),
        "ops": make_plan(source, model=replace(model, rules=[*rules[:query], unscaled, *rules[query + 1 :]])),
        "path": make_plan(source, model=replace(model, rules=[*rules[:query], renamed, *rules[query + 1 :]])),
    }
    monkeypatch.setattr(tiles, "REQUEST_BYTES", 1 << 10)
    plans["tiles"] = make_plan(source)
    assert len({plan.digest for plan in plans.values()}) == len(plans)


# ---- Budgets


def budget_error(source: Checkpoint, machine: Machine, layout: Layout) -> tuple[str, str, float]:
    """The leaf, the flag and the number that the error names."""
    with pytest.raises(BudgetError) as error:
        make_plan(source, machine, layout)
    match = re.search(r"^leaf '([^']+)': .*Give (--\w+)=([0-9.]+) or more", str(error.value))
    assert match is not None, str(error.value)
    return match[1], match[2], float(match[3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["kimi", "llama"])
@pytest.mark.parametrize("device_bytes", [None, 16 * GB])
@pytest.mark.parametrize("budget", [0, 1, GB // 10, GB // 4])
def test_a_host_budget_that_is_too_small(name: str, layout: Layout, device_bytes: int | None, budget: int) -> None:
    source = wide(name)
    machine = Machine(2, 4, budget, device_bytes)
    leaf, flag, number = budget_error(source, machine, layout)
    assert flag == "--host_memory_gb"
    plan = make_plan(source, replace(machine, host_bytes=int(number * GB)), layout)
    check_memory(plan)
    assert leaf in {planned.leaf.path for planned in plan.leaves}
    # It is the least, to one decimal, and more is no less.
    budget_error(source, replace(machine, host_bytes=int((number - 0.11) * GB)), layout)
    for factor in (1.3, 2, 5, 20, 100):
        check_memory(make_plan(source, replace(machine, host_bytes=int(number * factor * GB)), layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["kimi", "llama"])
@pytest.mark.parametrize("host_bytes", [2 * GB, 100 * GB])
def test_a_device_budget_that_is_too_small(name: str, layout: Layout, host_bytes: int) -> None:
    source = wide(name)
    machine = Machine(2, 4, host_bytes, 1 << 20)
    leaf, flag, number = budget_error(source, machine, layout)
    assert flag == "--device_memory_gb"
    plan = make_plan(source, replace(machine, device_bytes=int(number * GB)), layout)
    check_memory(plan)
    assert leaf in {planned.leaf.path for planned in plan.leaves}
    budget_error(source, replace(machine, device_bytes=int((number - 0.11) * GB)), layout)


def test_larger_budgets_make_larger_boxes_up_to_a_limit() -> None:
    source = wide("kimi")
    counts = [
        len(list(make_plan(source, replace(HOST, host_bytes=budget * GB)).boxes)) for budget in (1, 4, 16, 64, 1000)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1]
    assert counts[3] == counts[4]


def test_a_kimi_expert_leaf_fits_a_gigabyte() -> None:
    """The promise of the issue: true width, `--host_memory_gb=1`, on a CPU."""
    plan = make_plan(wide("kimi"), replace(HOST, host_bytes=GB))
    check(plan)


# ---- All of Kimi-K2.6


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 layers of 384 experts in 64 files, as headers over sparse files."""
    directory = tmp_path_factory.mktemp("kimi")
    command = [sys.executable, str(SCRIPT), "--out", str(directory), "--headers_only", "--files", "64"]
    subprocess.run(command, check=True, timeout=60)
    return directory


@dataclass(frozen=True)
class Child:
    """What a run of the command line printed and took; seconds of a processor, whatever else the machine does."""

    facts: Mapping[str, Any]
    seconds: float
    peak_bytes: int


# The command line, which says on stderr what it took. Not getrusage: its peak includes that of the parent process.
MEASURED = """
import atexit, sys, time
from slicecast.convert import cli
from slicecast.convert.progress import peak_resident_bytes
atexit.register(lambda: print(time.process_time(), peak_resident_bytes(), file=sys.stderr))
cli.run()
"""


def run_plan(directory: Path, *flags: str) -> Child:
    command = [sys.executable, "-c", MEASURED, "plan", f"--hf_model_path={directory}", "--json", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds, peak_bytes = done.stderr.splitlines()[-1].split()
    return Child(json.loads(done.stdout), float(seconds), int(peak_bytes))


def headers(directory: Path) -> dict[str, tuple[str, list[int], int]]:
    """Every tensor's dtype, shape and bytes, read without the module under test."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entries.pop("__metadata__")
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], end - begin)
    return found


@pytest.fixture(scope="module")
def kimi_bytes(kimi: Path) -> tuple[int, int]:
    """Bytes that a conversion must read and write."""
    read = written = 0
    for name, (dtype, shape, nbytes) in headers(kimi).items():
        if name.startswith(("vision_tower.", "mm_projector.")) or name.endswith("weight_shape"):
            continue
        read += nbytes
        if name.endswith("weight_packed"):
            written += math.prod(shape) * 8 * 2
        elif not name.endswith("weight_scale"):
            written += math.prod(shape) * (4 if dtype == "F32" else 2)
    return read, written


@pytest.mark.parametrize(
    ("flags", "hosts", "devices", "budget"),
    [
        (("--slice=v5e-16",), 4, 4, 192 * GB * 3 // 4),
        (("--host_memory_gb=128", "--simulated_cpu_devices_count=1"), 1, 1, 128 * GB),
    ],
    ids=["v5e-16", "one host"],
)
def test_all_of_kimi(
    kimi: Path, kimi_bytes: tuple[int, int], flags: tuple[str, ...], hosts: int, devices: int, budget: int
) -> None:
    child = run_plan(kimi, *flags)
    assert child.seconds < 30
    assert child.peak_bytes < 2 << 30
    facts = child.facts
    assert (facts["in_bytes"], facts["out_bytes"]) == kimi_bytes
    assert facts["in_bytes"] == 594_205_351_936  # 553 GiB.
    assert facts["out_bytes"] == 2_052_816_510_976
    assert (facts["hosts"], facts["devices_per_host"]) == (hosts, devices)
    assert facts["host_budget_bytes"] == budget
    assert facts["host_bytes_in_flight"] <= budget
    assert facts["leaves"] == len(maxtext.target_leaves("kimi-k2-1t", True))
    assert facts["files"] == 64
    assert facts["tensors"] == len(headers(kimi))
    assert facts["formats"]["int4 pack-quantized, group 32"] == 60 * 384 * 3
    assert len(facts["waves_per_host"]) == hosts
    assert sum(facts["waves_per_host"]) <= facts["boxes"] < facts["chunks"] < 300_000
    left_out = {ignored["why"].rpartition(" ")[0].rpartition("the ")[2]: ignored for ignored in facts["ignored"]}
    assert sum(ignored["tensors"] for ignored in left_out.values()) == 335
    if devices == 4:
        assert facts["device_bytes_in_flight"] <= facts["device_budget_bytes"] == 12 * GB
    else:
        assert facts["device_bytes_in_flight"] is facts["device_budget_bytes"] is None


def test_the_first_op_of_a_packed_weight_transposes() -> None:
    """The kernel returns `[in, out]`; a rule that does not begin so would pay for a second transposition."""
    source = tiny("kimi")
    plan = make_plan(source)
    for planned in plan.leaves:
        if any(tensor.codec.changes_values for tensor in planned.sources.values()):
            assert planned.leaf.rule.ops[:1] == (Transpose(),)
