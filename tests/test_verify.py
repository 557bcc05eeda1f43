"""The comparison of a checkpoint with its source: what it expects, what it notices, and what it lets pass."""

import functools
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore as ts
from safetensors.numpy import load_file, save_file

from slicecast.convert import commands, tiles
from slicecast.convert.box import Box
from slicecast.convert.memory import Machine
from slicecast.convert.plan import Plan
from slicecast.convert.settings import Settings
from slicecast.convert.verification import against_source
from slicecast.convert.verification.against_source import Difference, Region

Array = npt.NDArray[Any]
Leaves = dict[str, Array]

BF16 = np.dtype(ml_dtypes.bfloat16)
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"

# All sizes that could be confused with one another differ.
KIMI = {
    "layers": 4,
    "dense_layers": 1,
    "experts": 5,
    "hidden": 64,
    "intermediate": 40,
    "moe_intermediate": 32,
    "heads": 3,
}
KIMI |= {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "vocab": 50,
}
LLAMA = {"layers": 3, "hidden": 48, "intermediate": 40, "heads": 4, "kv_heads": 2, "vocab": 50}
ONE_HEAD = {"layers": 2, "hidden": 32, "intermediate": 40, "heads": 1, "kv_heads": 1, "vocab": 50}


# ---- Sources


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Source:
    """A small checkpoint on disk, and what it should become, by index arithmetic."""

    def __init__(self, path: Path, config: dict[str, Any], interleaved: bool):
        self.path = path
        self.config = config.get("text_config", config)
        self.prefix = "language_model." if "text_config" in config else ""
        self.interleaved = interleaved
        self.stored: Leaves = {}
        for file in sorted(path.glob("*.safetensors")):
            self.stored |= load_file(file)

    def plan(self, scan: bool, dtype: str = "bfloat16", host_bytes: int = 10**9) -> Plan:
        """The plan of a conversion."""
        name = None if self.interleaved or "kv_lora_rank" in self.config else "llama3-8b"
        settings = Settings(
            hf_model_path=str(self.path),
            scan_layers=scan,
            save_dtype=dtype,
            model_name=name,
            override_model_config=True,
        )
        return commands.make_plan(settings, Machine(1, 1, host_bytes, None))

    def weight(self, name: str) -> Array:
        """A tensor in float32. Packed ones are unpacked with integers and multiplied in float64, which is exact."""
        name = self.prefix + name
        if name in self.stored:
            return self.stored[name].astype(np.float32)
        base = name.removesuffix(".weight")
        words, scale = self.stored[f"{base}.weight_packed"].astype(np.int64), self.stored[f"{base}.weight_scale"]
        rows, columns = self.stored[f"{base}.weight_shape"]
        r, c = np.indices((rows, columns))
        values = ((words[r, c // 8] >> 4 * (c % 8)) & 15) - 8
        exact: Array = values * scale[r, c // 32].astype(np.float64)
        return exact.astype(np.float32)

    def truth(self, scan: bool, dtype: str = "bfloat16", **changes: Any) -> Leaves:
        """The leaves as they should be; `changes` are passed on to make them wrong."""
        elements = self._deepseek() if "kv_lora_rank" in self.config else self._llama(**changes)
        found: Leaves = {}
        stacks: dict[tuple[str, str], list[Array]] = {}
        for group, layer, suffix, x in elements:
            exact = np.ascontiguousarray(x, np.float32)
            values = exact if dtype == "float32" or suffix.endswith("gate/bias") else round_to_bf16(exact)
            path = f"params/params/{group}/{suffix}" if group else f"params/params/{suffix}"
            if layer is None:
                found[path] = values
            elif scan:
                stacks.setdefault((path, suffix), []).append(values)
            else:
                found[path.replace(group, f"{group}_{layer}", 1)] = values
        for (path, suffix), layers in stacks.items():
            found[path] = np.stack(layers, 0 if suffix.endswith("gate/bias") else 1)
        return found

    def _ends(self) -> Iterator[tuple[str, int | None, str, Array]]:
        yield "", None, "token_embedder/embedding", self.weight("model.embed_tokens.weight")
        yield "", None, "decoder/decoder_norm/scale", self.weight("model.norm.weight")
        yield "", None, "decoder/logits_dense/kernel", matrix(self.weight("lm_head.weight"))

    def _llama(
        self, *, scaled: bool = True, interleaved: bool | None = None
    ) -> Iterator[tuple[str, int | None, str, Array]]:
        yield from self._ends()
        c = self.config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        factor = np.float32((c["hidden_size"] // heads) ** -0.5) if scaled else np.float32(1)
        rotary = self.interleaved if interleaved is None else interleaved
        for layer in range(c["num_hidden_layers"]):
            here = functools.partial(self._layer, layer)
            yield "decoder/layers", layer, "pre_self_attention_layer_norm/scale", here("input_layernorm")
            yield "decoder/layers", layer, "post_self_attention_layer_norm/scale", here("post_attention_layernorm")
            query = split_out(here("self_attn.q_proj"), heads, rotary) * factor
            yield "decoder/layers", layer, "self_attention/query/kernel", query
            key = split_out(here("self_attn.k_proj"), kv_heads, rotary)
            yield "decoder/layers", layer, "self_attention/key/kernel", key
            yield "decoder/layers", layer, "self_attention/value/kernel", split_out(here("self_attn.v_proj"), kv_heads)
            yield "decoder/layers", layer, "self_attention/out/kernel", split_in(here("self_attn.o_proj"), heads)
            for part, leaf in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
                yield "decoder/layers", layer, f"mlp/{leaf}/kernel", matrix(here(f"mlp.{part}_proj"))

    def _deepseek(self) -> Iterator[tuple[str, int | None, str, Array]]:
        yield from self._ends()
        c = self.config
        heads, dense = c["num_attention_heads"], c["first_k_dense_replace"]
        for number in range(c["num_hidden_layers"]):
            here = functools.partial(self._layer, number)
            group, layer = ("dense_layers", number) if number < dense else ("moe_layers", number - dense)
            group = f"decoder/{group}"
            yield group, layer, "pre_self_attention_layer_norm/scale", here("input_layernorm")
            yield group, layer, "post_self_attention_layer_norm/scale", here("post_attention_layernorm")
            for name, leaf in (("q_a_proj", "wq_a"), ("kv_a_proj_with_mqa", "wkv_a")):
                yield group, layer, f"self_attention/{leaf}/kernel", matrix(here(f"self_attn.{name}"))
            for name, leaf in (("q_a_layernorm", "q_norm"), ("kv_a_layernorm", "kv_norm")):
                yield group, layer, f"self_attention/{leaf}/scale", here(f"self_attn.{name}")
            for name, leaf in (("q_b_proj", "wq_b"), ("kv_b_proj", "wkv_b")):
                yield group, layer, f"self_attention/{leaf}/kernel", split_out(here(f"self_attn.{name}"), heads)
            yield group, layer, "self_attention/out/kernel", split_in(here("self_attn.o_proj"), heads)
            parts = (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
            if number < dense:
                for part, leaf in parts:
                    yield group, layer, f"mlp/{leaf}/kernel", matrix(here(f"mlp.{part}_proj"))
                continue
            block = "DeepSeekMoeBlock_0"
            yield group, layer, f"{block}/MoeBlock_0/gate/kernel", matrix(here("mlp.gate"))
            bias = self.weight(f"model.layers.{number}.mlp.gate.e_score_correction_bias")
            yield group, layer, f"{block}/MoeBlock_0/gate/bias", bias
            for part, leaf in parts:
                experts = [matrix(here(f"mlp.experts.{e}.{part}_proj")) for e in range(c["n_routed_experts"])]
                yield group, layer, f"{block}/MoeBlock_0/{leaf}", np.stack(experts)
                shared = matrix(here(f"mlp.shared_experts.{part}_proj"))
                yield group, layer, f"{block}/shared_experts/{leaf}/kernel", shared

    def _layer(self, number: int, name: str) -> Array:
        return self.weight(f"model.layers.{number}.{name}.weight")


def matrix(w: Array) -> Array:
    """`T[i, o] = W[o, i]`."""
    i, o = np.indices(w.shape[::-1])
    t: Array = w[o, i]
    return t


def split_out(w: Array, heads: int, interleaved: bool = False) -> Array:
    """`T[i, h, d] = W[h * D + d, i]`; interleaved, the second half of each head fills the odd places."""
    dim = w.shape[0] // heads
    i, h, d = np.indices((w.shape[1], heads, dim))
    if interleaved:
        d = d // 2 + d % 2 * (dim // 2)
    t: Array = w[h * dim + d, i]
    return t


def split_in(w: Array, heads: int) -> Array:
    """`T[h, d, e] = W[e, h * D + d]`."""
    dim = w.shape[1] // heads
    h, d, e = np.indices((heads, dim, w.shape[0]))
    t: Array = w[e, h * dim + d]
    return t


def round_to_bf16(x: Array) -> Array:
    """Finite float32 values rounded to nearest even, with integer arithmetic."""
    u = x.view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16).view(BF16)


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    @functools.cache
    def make(name: str) -> Source:
        family, sizes = {
            "kimi": ("kimi-k2.6", KIMI),
            "llama3.1": ("llama", LLAMA),
            "llama3": ("llama", LLAMA),
            "one head": ("llama", ONE_HEAD),
        }[name]
        path = tmp_path_factory.mktemp("source") / "checkpoint"
        script().write_checkpoint(str(path), family=family, **sizes)
        config = script().make_config(family, sizes, False)
        return Source(path, config, interleaved=name == "llama3.1")

    return make


def values(plan: Plan, arrays: dict[str, ts.TensorStore], report: Callable[[int], None]) -> list[Difference]:
    """The differences that are found among all values."""
    regions = list(map(Region.of, plan.boxes))
    return against_source.differences(against_source.compare_values(plan, arrays, regions, report, 10**9))


def compare(plan: Plan, leaves: Leaves) -> list[Difference]:
    """The differences that are found, through arrays in memory."""
    compared: list[int] = []
    arrays = {path: ts.array(np.ascontiguousarray(x)) for path, x in leaves.items()}
    found = against_source.compare_trees(plan, arrays)
    if not found:
        found = values(plan, arrays, compared.append)
        assert sum(compared) == plan.out_bytes
    return found


# ---- What is expected


NAMES = ["kimi", "llama3.1", "llama3"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", NAMES)
def test_the_expected_values(sources: Callable[[str], Source], name: str, scan: bool, dtype: str) -> None:
    source = sources(name)
    plan = source.plan(scan, dtype)
    truth = source.truth(scan, dtype)
    assert {planned.leaf.path for planned in plan.leaves} == set(truth)
    for planned in plan.leaves:
        wanted = truth[planned.leaf.path]
        found = against_source._expected(plan, planned, Box.whole(planned.leaf.shape))
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), planned.leaf.path
        assert np.array_equal(bits(found), bits(wanted)), planned.leaf.path
    assert compare(plan, truth) == []


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", [*NAMES, "one head"])
def test_the_expected_values_of_each_box(
    sources: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch, name: str, scan: bool
) -> None:
    """With tiles so small that leaves are cut along all of their axes."""
    small = {"COLUMN": 600, "REQUEST": 100, "MAX_CHUNK": 400, "MAX_INNER": 200, "SMALL": 200}
    for constant, nbytes in small.items():
        monkeypatch.setattr(tiles, f"{constant}_BYTES", nbytes)
    source = sources(name)
    plan = source.plan(scan, host_bytes=10**4)
    truth = source.truth(scan)
    boxes = list(plan.boxes)
    assert len(boxes) > 2 * len(plan.leaves)
    for work in boxes:
        found = against_source._expected(plan, work.leaf, work.box)
        wanted = truth[work.leaf.leaf.path][work.box.slices]
        assert np.array_equal(bits(found), bits(wanted)), (work.leaf.leaf.path, work.box)
    assert compare(plan, truth) == []


def test_the_place_of_a_difference_in_a_leaf_of_many_boxes(
    sources: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "COLUMN_BYTES", 600)
    monkeypatch.setattr(tiles, "SMALL_BYTES", 200)
    source = sources("kimi")
    plan, leaves = source.plan(True, host_bytes=10**4), source.truth(True)
    path = ending(leaves, "MoeBlock_0/wo")
    boxes = [work.box for work in plan.boxes if work.leaf.leaf.path == path]
    last = max(boxes, key=lambda box: box.start)
    assert all(last.start[axis] > 0 for axis in (0, 1, 3))
    index = tuple(stop - 1 for stop in last.stop)
    leaves[path][index] = 77
    (difference,) = compare(plan, leaves)
    assert difference.path == path
    assert difference.detail.startswith(f"1 values differ; the first is at {list(index)}: ")


def test_rows_that_are_not_neighbors_are_an_error(sources: Callable[[str], Source]) -> None:
    """A planner that asked for such a box would be wrong."""
    plan = sources("llama3").plan(True)
    (planned,) = [x for x in plan.leaves if x.leaf.path.endswith("query/kernel")]
    whole = Box.whole(planned.leaf.shape)
    with pytest.raises(ValueError, match="neighboring rows"):
        against_source._expected(plan, planned, whole.with_axis(-1, 0, 1))
    plan = sources("llama3.1").plan(True)
    (planned,) = [x for x in plan.leaves if x.leaf.path.endswith("query/kernel")]
    with pytest.raises(ValueError, match="permutes"):
        against_source._expected(plan, planned, whole.with_axis(-1, 0, 4))


# ---- What is noticed


def differing(one: Leaves, other: Leaves) -> dict[str, int]:
    """How many values differ in each leaf, where any do."""
    counts = {path: int(np.count_nonzero(bits(one[path]) != bits(other[path]))) for path in one}
    return {path: count for path, count in counts.items() if count}


def check_noticed(source: Source, scan: bool, mutated: Leaves, *leaves: str) -> None:
    """All values that were changed are counted, in the leaves whose paths end so, and nothing else."""
    truth = source.truth(scan)
    counts = differing(truth, mutated)
    assert counts
    assert {path for path in counts if not path.endswith(leaves)} == set()
    found = compare(source.plan(scan), mutated)
    assert [difference.path for difference in found] == sorted(counts)
    for difference in found:
        path, detail = difference.path, difference.detail
        match = re.fullmatch(r"(\d+) values differ; the first is at (\[.*\]): (.*), expected (.*)", detail)
        assert match is not None, detail
        assert int(match[1]) == counts[path]
        index = tuple(map(int, match[2].strip("[]").split(", ")))
        assert bits(truth[path][index]) != bits(mutated[path][index])
        assert f"{float(mutated[path][index])!r}" in match[3]
        assert f"{float(truth[path][index])!r}" in match[4]


def ending(leaves: Leaves, suffix: str) -> str:
    (path,) = [path for path in leaves if path.endswith(suffix)]
    return path


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_in_any_leaf(sources: Callable[[str], Source], name: str, scan: bool) -> None:
    source = sources(name)
    mutated = source.truth(scan)
    rng = np.random.default_rng(0)
    for x in mutated.values():
        index = tuple(int(rng.integers(size)) for size in x.shape)
        bits_of_x = x.view(f"u{x.dtype.itemsize}")
        bits_of_x[index] ^= 1 << int(rng.integers(6 if x.dtype == BF16 else 20))
    assert len(differing(source.truth(scan), mutated)) == len(mutated)
    check_noticed(source, scan, mutated, "")


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_two_swapped_experts(sources: Callable[[str], Source], scan: bool) -> None:
    source = sources("kimi")
    mutated = source.truth(scan)
    path = ending(
        mutated,
        "moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo" if scan else "moe_layers_2/DeepSeekMoeBlock_0/MoeBlock_0/wo",
    )
    mutated[path] = mutated[path][[0, 3, 2, 1, 4]]
    check_noticed(source, scan, mutated, "MoeBlock_0/wo")


def test_experts_of_one_layer_in_another(sources: Callable[[str], Source]) -> None:
    source = sources("kimi")
    mutated = source.truth(True)
    path = ending(mutated, "MoeBlock_0/wi_1")
    mutated[path][2, 0], mutated[path][2, 1] = mutated[path][2, 1].copy(), mutated[path][2, 0].copy()
    check_noticed(source, True, mutated, "MoeBlock_0/wi_1")


@pytest.mark.parametrize(("suffix", "axis"), [("mlp/wi_0/kernel", 2), ("mlp/wi_0/kernel", 0), ("out/kernel", 3)])
def test_wrong_row_order(sources: Callable[[str], Source], suffix: str, axis: int) -> None:
    source = sources("llama3.1")
    mutated = source.truth(True)
    path = ending(mutated, suffix)
    mutated[path] = np.flip(mutated[path], axis)
    check_noticed(source, True, mutated, suffix)


@pytest.mark.parametrize("name", ["llama3.1", "llama3"])
def test_a_wrong_rotary_permutation(sources: Callable[[str], Source], name: str) -> None:
    source = sources(name)
    mutated = source.truth(True, interleaved=name == "llama3")
    check_noticed(source, True, mutated, "query/kernel", "key/kernel")
    assert len(differing(source.truth(True), mutated)) == 2


def test_an_off_by_one_layer(sources: Callable[[str], Source]) -> None:
    for name in NAMES:
        source = sources(name)
        mutated = source.truth(True)
        moved = []
        for path, x in mutated.items():
            if "layers" in path and "dense_layers" not in path:
                axis = 0 if path.endswith("gate/bias") else 1
                mutated[path] = np.roll(x, 1, axis)
                moved.append(path)
        check_noticed(source, True, mutated, *moved)
        assert set(differing(source.truth(True), mutated)) == set(moved)


def test_a_missing_scale(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    mutated = source.truth(True, scaled=False)
    check_noticed(source, True, mutated, "query/kernel")


def test_scales_of_the_next_group(sources: Callable[[str], Source]) -> None:
    source = sources("kimi")
    original = dict(source.stored)
    try:
        for name, x in original.items():
            if name.endswith("down_proj.weight_scale"):
                source.stored[name] = np.roll(x, 1, 0)
        mutated = source.truth(True)
    finally:
        source.stored = original
    check_noticed(source, True, mutated, "MoeBlock_0/wo")


def test_products_that_were_rounded_to_float16_first(sources: Callable[[str], Source]) -> None:
    """As MaxText's own script does: the difference is in the last bits of a few values."""
    source = sources("llama3.1")
    truth, exact = source.truth(True), source.truth(True, "float32")
    path = ending(truth, "query/kernel")
    mutated = truth | {path: round_to_bf16(exact[path].astype(np.float16).astype(np.float32))}
    count = differing(truth, mutated)[path]
    assert 0 < count < truth[path].size / 10
    check_noticed(source, True, mutated, "query/kernel")


def test_values_that_were_cut_off_instead_of_rounded(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    truth, exact = source.truth(True), source.truth(True, "float32")
    path = ending(truth, "query/kernel")
    cut = (exact[path].view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    check_noticed(source, True, truth | {path: cut}, "query/kernel")


def test_a_chunk_that_was_never_written(sources: Callable[[str], Source]) -> None:
    """It reads as zeros."""
    source = sources("kimi")
    mutated = source.truth(True)
    path = ending(mutated, "MoeBlock_0/wo")
    mutated[path][1:2, 2:3] = 0
    check_noticed(source, True, mutated, "MoeBlock_0/wo")


def test_missing_and_surplus_leaves(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    plan, leaves = source.plan(True), source.truth(True)
    norm = "params/params/decoder/decoder_norm/scale"
    missing = {path: x for path, x in leaves.items() if path != norm}
    assert compare(plan, missing) == [Difference(norm, "is missing")]
    extra = leaves | {"params/params/decoder/extra": np.zeros(3, np.float32)}
    assert compare(plan, extra) == [Difference("params/params/decoder/extra", "is not expected")]
    assert [x.detail for x in compare(plan, {})] == ["is missing"] * len(leaves)


def test_wrong_dtypes_and_shapes(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    plan, leaves = source.plan(True), source.truth(True)
    norm, out = "params/params/decoder/decoder_norm/scale", "params/params/decoder/layers/self_attention/out/kernel"
    for wrong in (np.float32, np.float16, np.uint16):
        found = compare(plan, leaves | {norm: leaves[norm].astype(wrong)})
        assert found == [Difference(norm, f"is {np.dtype(wrong).name}[48], expected bfloat16[48]")]
    found = compare(plan, leaves | {out: leaves[out].swapaxes(1, 2)})
    assert found == [Difference(out, "is bfloat16[4, 12, 3, 48], expected bfloat16[4, 3, 12, 48]")]
    found = compare(plan, source.truth(True, "float32"))
    assert len(found) == len(leaves)


def test_the_other_layout(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    found = compare(source.plan(True), source.truth(False))
    assert {difference.detail for difference in found} == {"is missing", "is not expected"}


def test_data_that_cannot_be_read(sources: Callable[[str], Source]) -> None:
    """A damaged chunk is a difference of its leaf, and the others are still compared."""
    source = sources("llama3.1")
    plan, truth = source.plan(True), source.truth(True)
    arrays = {path: ts.array(np.ascontiguousarray(x)) for path, x in truth.items()}
    path, other = ending(truth, "logits_dense/kernel"), ending(truth, "query/kernel")
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    metadata = {"shape": truth[path].shape, "data_type": "bfloat16", "codecs": codecs}
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": metadata}
    context = ts.Context()
    arrays[path] = ts.open(spec, create=True, context=context).result()
    arrays[path].write(truth[path]).result()
    assert values(plan, arrays, lambda _: None) == []
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    (key,) = [key for key in store.list().result() if not key.endswith(b"zarr.json")]
    data = bytearray(store.read(key).result().value)
    data[10] ^= 1
    store.write(key, bytes(data)).result()
    wrong = truth[other].copy()
    wrong[0, 0, 0, 0] = 77
    arrays[other] = ts.array(wrong)
    first, second = values(plan, arrays, lambda _: None)
    assert (first.path, second.path) == (other, path)
    assert first.detail.startswith("1 values differ; the first is at [0, 0, 0, 0]: ")
    assert "cannot be read" in second.detail


def test_numbers_are_spelled_plainly(sources: Callable[[str], Source]) -> None:
    source = sources("llama3.1")
    leaves = source.truth(True)
    norm = leaves["params/params/decoder/decoder_norm/scale"]
    value = float(norm[5])
    norm[5] = 77
    (difference,) = compare(source.plan(True), leaves)
    assert difference.detail == f"1 values differ; the first is at [5]: 77.0, expected {value!r}"


# ---- What is let pass


NANS = [0x7FC0, 0xFFC0, 0x7F81, 0x7FFF, 0xFF80 | 1]
INFINITIES = [0x7F80, 0xFF80]
SUBNORMALS = [0x0001, 0x8001, 0x007F, 0x807F, 0x0040]


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of head dim 4, so that queries are halved, with special values in its moved and its computed leaves.

    Row by row: NaNs, infinities, subnormals, zeros of both signs, 2**-126 and 2**-125 (which becomes 2**-126).
    """
    path = tmp_path_factory.mktemp("special")
    sizes = {"layers": 1, "hidden": 16, "intermediate": 24, "heads": 4, "kv_heads": 4, "vocab": 20}
    script().write_checkpoint(str(path / "plain"), family="llama", files=1, **sizes)
    (file,) = (path / "plain").glob("*.safetensors")
    tensors = load_file(file)
    values = np.array([*NANS, *INFINITIES, *SUBNORMALS, 0x0000, 0x8000, 0x0080, 0x0100], np.uint16).view(BF16)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        tensors[name] = tensors[name].copy()
        tensors[name][0, : len(values)] = values
    save_file(tensors, file)
    return Source(path / "plain", script().make_config("llama", sizes, False), interleaved=False)


MOVED = "token_embedder/embedding"
TRANSPOSED = "mlp/wi_1/kernel"
COMPUTED = "query/kernel"
# Where the special value with a number is, in each leaf.
PLACES: dict[str, Callable[[int], tuple[int, ...]]] = {
    MOVED: lambda i: (0, i),
    TRANSPOSED: lambda i: (i, 0, 0),
    COMPUTED: lambda i: (i, 0, 0, 0),
}
NAN, INFINITY, SUBNORMAL, ZERO, SMALLEST, TWICE = 0, 5, 7, 12, 14, 15


def special_leaves(source: Source) -> tuple[Plan, Leaves]:
    """The leaves as `verify` expects them (checked above); the oracle's rounding is not made for NaNs."""
    plan = source.plan(True)
    return plan, {x.leaf.path: against_source._expected(plan, x, Box.whole(x.leaf.shape)) for x in plan.leaves}


def verdict(source: Source, suffix: str, number: int, value: int) -> bool:
    """Whether a special value is let pass as other bits."""
    plan, leaves = special_leaves(source)
    assert compare(plan, leaves) == []
    path = ending(leaves, suffix)
    changed = leaves[path].copy()
    changed.view(np.uint16)[PLACES[suffix](number)] = value
    assert bits(changed).tolist() != bits(leaves[path]).tolist()
    found = compare(plan, leaves | {path: changed})
    assert [difference.path for difference in found] in ([], [path])
    assert all(difference.detail.startswith("1 values differ") for difference in found)
    return not found


def test_the_special_values_are_where_they_should_be(special: Source) -> None:
    _, leaves = special_leaves(special)
    for suffix, place in PLACES.items():
        x = leaves[ending(leaves, suffix)]
        factor = 0.5 if suffix == COMPUTED else 1.0
        found = [float(x[place(i)]) for i in range(16)]
        assert all(math.isnan(value) for value in found[:INFINITY])
        assert found[INFINITY:SUBNORMAL] == [math.inf, -math.inf]
        assert all(0 <= abs(value) < 2.0**-126 for value in found[SUBNORMAL:ZERO])
        assert found[ZERO:] == [0.0, -0.0, factor * 2.0**-126, factor * 2.0**-125]
        assert [math.copysign(1, value) for value in found[ZERO : ZERO + 2]] == [1, -1]


@pytest.mark.parametrize("suffix", PLACES)
def test_nans_are_equal_whatever_their_payload(special: Source, suffix: str) -> None:
    for payload in (0x7FC1, 0xFFD5, 0x7F82):
        assert verdict(special, suffix, NAN, payload)
        assert verdict(special, suffix, NAN + 3, payload)


@pytest.mark.parametrize("suffix", PLACES)
def test_nans_equal_nothing_else(special: Source, suffix: str) -> None:
    for value in (0x7F80, 0x0000, 0x3F80):
        assert not verdict(special, suffix, NAN, value)
    for number in (INFINITY, SUBNORMAL, ZERO, SMALLEST):
        assert not verdict(special, suffix, number, 0x7FC0)


@pytest.mark.parametrize("suffix", PLACES)
def test_infinities_equal_themselves_only(special: Source, suffix: str) -> None:
    for value in (0xFF80, 0x7F7F, 0x0000):
        assert not verdict(special, suffix, INFINITY, value)


@pytest.mark.parametrize("suffix", [MOVED, TRANSPOSED])
def test_moved_subnormals_must_be_kept(special: Source, suffix: str) -> None:
    for number, sign in (
        (SUBNORMAL, 0x0000),
        (SUBNORMAL + 1, 0x8000),
        (SUBNORMAL + 2, 0x0000),
        (SUBNORMAL + 3, 0x8000),
    ):
        assert not verdict(special, suffix, number, sign)


def test_computed_subnormals_may_become_a_zero_of_their_sign(special: Source) -> None:
    # Halved, 0x007F is 0x0040 (rounded to even) and 0x0080, the smallest normal number, is 0x0040 too.
    for number, sign in ((SUBNORMAL + 2, 0x0000), (SUBNORMAL + 3, 0x8000), (SMALLEST, 0x0000)):
        assert verdict(special, COMPUTED, number, sign)
        assert not verdict(special, COMPUTED, number, sign ^ 0x8000)


def test_nothing_else_about_computed_subnormals_passes(special: Source) -> None:
    for value in (0x0041, 0x003F, 0x8040, 0x0080, 0x0001):
        assert not verdict(special, COMPUTED, SMALLEST, value)
    # A zero that should be one, but is subnormal or of the other sign.
    for value in (0x0001, 0x8000, 0x0040):
        assert not verdict(special, COMPUTED, ZERO, value)
    # The smallest normal number is not subnormal.
    assert not verdict(special, COMPUTED, TWICE, 0x0000)
    assert not verdict(special, COMPUTED, TWICE, 0x007F)


@pytest.mark.parametrize("suffix", PLACES)
def test_the_sign_of_a_zero_counts(special: Source, suffix: str) -> None:
    assert not verdict(special, suffix, ZERO, 0x8000)
    assert not verdict(special, suffix, ZERO + 1, 0x0000)


def test_another_dtype_counts_as_computed(special: Source) -> None:
    """In float32 the embedding is converted, so its subnormals may be zeros; in bfloat16 it is copied."""
    plan = special.plan(True, "float32")
    leaves = {x.leaf.path: against_source._expected(plan, x, Box.whole(x.leaf.shape)) for x in plan.leaves}
    path = ending(leaves, MOVED)
    leaves[path] = np.where(np.abs(leaves[path]) < 2.0**-126, np.copysign(np.float32(0), leaves[path]), leaves[path])
    assert compare(plan, leaves) == []
    leaves[path][0, ZERO] = -0.0
    assert [difference.path for difference in compare(plan, leaves)] == [path]
