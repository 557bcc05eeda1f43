"""How leaves are cut: the promises of `tiles.py` for every leaf of the real models, and for odd sizes."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.configs import families
from slicecast.convert import tiles
from slicecast.convert.box import Box, Shape, grid_size
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import InterleaveHalves, Op, Scale, Split, Transpose
from slicecast.convert.mapping.rules import Rule, stacked
from slicecast.convert.mapping.target import Layout, Leaf, leaves
from slicecast.convert.tiles import (
    COLUMN_BYTES,
    EXPERT_CHUNKS,
    MAX_CHUNK_BYTES,
    MAX_INNER_BYTES,
    MIN_CHUNK_BYTES,
    Tiling,
)

MIB = 1 << 20
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "vocab_size": 129280,
}
KIMI = {"first_k_dense_replace": 1, "num_attention_heads": 64, "n_routed_experts": 384, "vocab_size": 163840}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "vocab_size": 102400,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "vocab_size": 201088,
}
MODELS: dict[str, dict[str, Any]] = {
    "Kimi-K2": DEEPSEEK_V3 | KIMI,
    "DeepSeek-V3": DEEPSEEK_V3,
    "DeepSeek-V2-Lite": DEEPSEEK_V3 | V2_LITE,
    "gpt-oss-120B": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20B": GPT_OSS,
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256) | {"rope_scaling": {"rope_type": "llama3"}},
    "Llama-3.1-70B": llama(8192, 28672, 80, 64, 8, 128256) | {"rope_scaling": {"rope_type": "llama3"}},
    "Llama-3.1-405B": llama(16384, 53248, 126, 128, 8, 128256) | {"rope_scaling": {"rope_type": "llama3"}},
    "Mistral-7B": llama(4096, 14336, 32, 32, 8, 32000) | {"architectures": ["MistralForCausalLM"]},
}
# Chunks of each model in bfloat16, scanned or not, at most: a key each in the database, which every host lists once.
CHUNKS = {
    "Kimi-K2": 284_000,
    "DeepSeek-V3": 185_000,
    "DeepSeek-V2-Lite": 23_000,
    "gpt-oss-120B": 30_000,
    "gpt-oss-20B": 20_500,
    "Llama-2-7B": 4_000,
    "Llama-3.1-8B": 4_000,
    "Llama-3.1-70B": 18_000,
    "Llama-3.1-405B": 76_000,
    "Mistral-7B": 4_000,
}
LAYOUTS = [Layout(scan, axis, dtype) for scan, axis in ((True, 1), (True, 0), (False, 1)) for dtype in ITEM_BYTES]


def model_leaves(config: dict[str, Any], layout: Layout) -> list[Leaf]:
    return [leaf for rule in families.recognize(config).rules for leaf in leaves(rule, layout)]


def tiled(config: dict[str, Any], layout: Layout) -> Iterator[tuple[Leaf, int, Tiling]]:
    """Every leaf with its bytes an element and its tiling; the layers of an unscanned model share theirs."""
    known: dict[Rule, Tiling] = {}
    for leaf in model_leaves(config, layout):
        itemsize = ITEM_BYTES[leaf.dtype]
        if leaf.rule not in known:
            known[leaf.rule] = tiles.choose(leaf, itemsize)
        yield leaf, itemsize, known[leaf.rule]


def check_structure(leaf: Leaf, tiling: Tiling) -> None:
    """What must hold whatever the sizes."""
    for axis, size in enumerate(leaf.shape):
        chunk, inner, column = tiling.chunk[axis], tiling.inner[axis], tiling.column[axis]
        assert 1 <= inner <= chunk <= size
        assert chunk % inner == 0
        assert column == size or column % chunk == 0
    assert len(tiling.chunk) == len(tiling.inner) == len(tiling.column) == len(leaf.shape)
    check_columns(leaf, tiling)


def check_columns(leaf: Leaf, tiling: Tiling) -> None:
    """A column is whole rows of each of its tensors, of all columns of the same rows; the columns make up the leaf."""
    element = leaf.element_shape
    whole = ops.boxes(leaf.rule.ops, Box.whole(element), leaf.rule.shape)[0]
    rows_of = []
    for box in Box.whole(element).tiles(leaf.element_box(Box.whole(tiling.column)).shape):
        source = ops.boxes(leaf.rule.ops, box, leaf.rule.shape)[0]
        assert source == whole.with_axis(0, source.start[0], source.stop[0])
        rows_of.append((source.start[0], source.stop[0]))
    assert rows_of[0][0] == 0
    assert rows_of[-1][1] == leaf.rule.shape[0]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(rows_of))


def nbytes(shape: Shape, itemsize: int) -> int:
    return math.prod(shape) * itemsize


# ---- The real models


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_of_the_real_models(name: str, layout: Layout) -> None:
    chunks = total = count = 0
    checked = set()
    for leaf, itemsize, tiling in tiled(MODELS[name], layout):
        count += 1
        chunks += grid_size(leaf.shape, tiling.chunk)
        total += nbytes(leaf.shape, itemsize)
        if leaf.rule in checked:
            continue
        checked.add(leaf.rule)
        check_structure(leaf, tiling)
        # No exceptions: some axis of every leaf of these models follows the rows of its source.
        assert tiling.row_axis is not None
        assert nbytes(tiling.column, itemsize) <= COLUMN_BYTES
        assert nbytes(tiling.chunk, itemsize) <= MAX_CHUNK_BYTES
        assert nbytes(tiling.inner, itemsize) <= MAX_INNER_BYTES
        # Chunks are cut to whole divisors, so they can be up to a half smaller than asked for, but not smaller.
        whole = nbytes(leaf.shape, itemsize)
        assert nbytes(tiling.chunk, itemsize) >= min(MIN_CHUNK_BYTES // 2, whole)
        assert 2 * nbytes(tiling.inner, itemsize) >= min(MIN_CHUNK_BYTES, nbytes(tiling.chunk, itemsize))
    # Chunks are a MiB or more on average, beside the small leaves that are one chunk each.
    assert chunks <= count + total // MIB
    if layout.save_dtype == "bfloat16" and layout.param_scan_axis == 1:
        assert chunks <= CHUNKS[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_readers_axes_are_cut_finely(name: str) -> None:
    """Fsdp up to 7 or more reads no byte in vain of large leaves, nor does expert parallelism up to 16."""
    for leaf, itemsize, tiling in tiled(MODELS[name], Layout(True)):
        for axis, logical in enumerate(leaf.axes):
            if logical == "exp":
                # Of experts that are one tensor, a small leaf (their biases) is not cut below what a chunk is worth.
                of_one_layer = nbytes(leaf.element_shape, itemsize) // MIN_CHUNK_BYTES
                wanted = EXPERT_CHUNKS if axis in dict(leaf.stacked) else min(EXPERT_CHUNKS, of_one_layer)
                assert -(-leaf.shape[axis] // tiling.chunk[axis]) >= wanted
                assert leaf.shape[axis] % tiling.chunk[axis] == 0
            elif logical is not None and logical.startswith("embed"):
                of_one_layer = nbytes(tiling.column, itemsize) if axis != tiling.row_axis else COLUMN_BYTES
                wanted = min(tiles.EMBED_CHUNKS, of_one_layer // MIN_CHUNK_BYTES)
                if nbytes(leaf.element_shape, itemsize) >= tiles.EMBED_CHUNKS * MIN_CHUNK_BYTES:
                    assert -(-leaf.shape[axis] // tiling.chunk[axis]) >= wanted
                assert leaf.shape[axis] % tiling.chunk[axis] == 0


def test_layers_are_read_one_at_a_time() -> None:
    for config in MODELS.values():
        for leaf, itemsize, tiling in tiled(config, Layout(True)):
            for axis, stack in leaf.stacked:
                if stack.placeholder == "layer" and nbytes(leaf.shape, itemsize) > tiles.SMALL_BYTES:
                    bytes_of_one = nbytes(tiling.column, itemsize) // tiling.column[axis]
                    assert tiling.chunk[axis] == 1 or tiling.chunk[axis] * bytes_of_one <= tiles.SMALL_BYTES


@pytest.mark.parametrize(
    ("scan", "suffix", "expected"),
    [
        # Four experts' rows are 112 MiB, the largest number that stays under COLUMN_BYTES; 16 chunks over embed.
        (True, "MoeBlock_0/wi_0", Tiling((4, 1, 448, 2048), (4, 1, 112, 2048), 3, (4, 1, 7168, 2048))),
        (True, "MoeBlock_0/wi_1", Tiling((4, 1, 448, 2048), (4, 1, 112, 2048), 3, (4, 1, 7168, 2048))),
        # Here the rows of the source are the embed axis, so 448 of them can be read alone.
        (True, "MoeBlock_0/wo", Tiling((4, 1, 2048, 448), (4, 1, 2048, 112), 3, (4, 1, 2048, 448))),
        (False, "MoeBlock_0/wi_0", Tiling((4, 448, 2048), (4, 112, 2048), 2, (4, 7168, 2048))),
        (False, "MoeBlock_0/wo", Tiling((4, 2048, 448), (4, 2048, 112), 2, (4, 2048, 448))),
        (True, "gate/bias", Tiling((60, 384), (60, 384), 1, (60, 384))),
        (True, "token_embedder/embedding", Tiling((8192, 448), (8192, 112), 0, (8192, 7168))),
        (True, "moe_layers/pre_self_attention_layer_norm/scale", Tiling((7168, 60), (7168, 60), 0, (7168, 60))),
    ],
)
def test_kimi_spelled_out(scan: bool, suffix: str, expected: Tiling) -> None:
    leaf = next(leaf for leaf in model_leaves(MODELS["Kimi-K2"], Layout(scan)) if leaf.path.endswith(suffix))
    found = tiles.choose(leaf, ITEM_BYTES[leaf.dtype])
    assert found == expected


@pytest.mark.parametrize(
    ("scan", "suffix", "expected"),
    [
        # The rows of the source are the experts: 2 of 32 are a 16th, and 32 MB, which 16 chunks over embed share.
        (True, "layers_1/GptOssMlp/wi_1", Tiling((2, 1, 180, 2880), (2, 1, 180, 2880), 0, (2, 1, 2880, 2880))),
        (False, "layers_23/GptOssMlp/wi_1", Tiling((2, 180, 2880), (2, 180, 2880), 0, (2, 2880, 2880))),
        (True, "layers_0/GptOssMlp/wo", Tiling((2, 1, 2880, 180), (2, 1, 2880, 180), 0, (2, 1, 2880, 2880))),
        # 2.1 MiB are worth two chunks.
        (True, "layers_1/GptOssMlp/wi_1_bias", Tiling((16, 12, 2880), (16, 12, 2880), 0, (16, 12, 2880))),
        (True, "layers_1/GptOssAttention/sinks", Tiling((64, 12), (64, 12), 0, (64, 12))),
    ],
)
def test_gpt_oss_spelled_out(scan: bool, suffix: str, expected: Tiling) -> None:
    leaf = next(leaf for leaf in model_leaves(MODELS["gpt-oss-20B"], Layout(scan)) if leaf.path.endswith(suffix))
    assert tiles.choose(leaf, 2) == expected


def test_a_kimi_expert_chunk_is_7_mib() -> None:
    leaf = next(x for x in model_leaves(MODELS["Kimi-K2"], Layout(True)) if x.path.endswith("MoeBlock_0/wi_0"))
    tiling = tiles.choose(leaf, 2)
    assert nbytes(tiling.column, 2) == 112 * MIB
    assert nbytes(tiling.chunk, 2) == 7 * MIB
    assert nbytes(tiling.inner, 2) == 7 * MIB // 4
    assert grid_size(leaf.shape, tiling.chunk) == 96 * 60 * 16


def test_all_layers_of_an_unscanned_model_are_cut_alike() -> None:
    by_rule: dict[Rule, set[Tiling]] = {}
    for leaf in model_leaves(MODELS["DeepSeek-V2-Lite"], Layout(False)):
        by_rule.setdefault(leaf.rule, set()).add(tiles.choose(leaf, ITEM_BYTES[leaf.dtype]))
    assert {len(tilings) for tilings in by_rule.values()} == {1}


# ---- Odd sizes


ODD = {
    "prime vocabulary": MODELS["Llama-2-7B"] | {"vocab_size": 32003},
    "prime everything": llama(4099, 11003, 31, 37, 1, 32003) | {"head_dim": 106},
    "one head": llama(64, 96, 3, 1, 1, 50) | {"rope_scaling": {"rope_type": "llama3"}},
    "61 layers": llama(512, 1024, 61, 8, 2, 1000),
    "hidden 100": llama(100, 300, 7, 5, 5, 10007),
    "five experts": DEEPSEEK_V3 | {"n_routed_experts": 5, "num_hidden_layers": 4},
    "five experts in one tensor": GPT_OSS | {"num_local_experts": 5, "num_hidden_layers": 2},
    "tiny experts in one tensor": GPT_OSS | {"num_local_experts": 1009, "hidden_size": 100, "intermediate_size": 36},
    "many tiny experts": DEEPSEEK_V3 | {"n_routed_experts": 1009, "hidden_size": 100, "moe_intermediate_size": 36},
    "one of everything": llama(2, 1, 1, 1, 1, 1) | {"head_dim": 2},
}
# Where no axis can be halved any more, a chunk may stay as large as its column.
CHUNK_BOUND = {"prime everything": COLUMN_BYTES}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name: str, layout: Layout) -> None:
    chunks = total = count = 0
    for leaf, itemsize, tiling in tiled(ODD[name], layout):
        count += 1
        check_structure(leaf, tiling)
        chunks += grid_size(leaf.shape, tiling.chunk)
        total += nbytes(leaf.shape, itemsize)
        assert nbytes(tiling.chunk, itemsize) <= CHUNK_BOUND.get(name, MAX_CHUNK_BYTES)
        assert nbytes(tiling.column, itemsize) <= COLUMN_BYTES
        assert nbytes(tiling.chunk, itemsize) >= min(MIN_CHUNK_BYTES // 2, nbytes(leaf.shape, itemsize)) // 4
    assert chunks <= 2 * count + 4 * total // MIB


def test_a_prime_vocabulary_sticks_out_at_the_end() -> None:
    leaf = next(x for x in model_leaves(ODD["prime vocabulary"], Layout(True)) if x.path.endswith("embedding"))
    tiling = tiles.choose(leaf, 2)
    assert tiling.chunk[0] * 4096 * 2 <= COLUMN_BYTES
    assert tiling.chunk[0] > 32003 // 3
    assert tiling.chunk[0] * -(-32003 // tiling.chunk[0]) > 32003


def test_the_only_unbounded_columns_are_those_that_cannot_be_read_in_parts() -> None:
    """A permuted axis of a single head holds all rows: nothing can be cut, so the column is the tensor."""
    source, hidden = (2 * COLUMN_BYTES // 64, 16), 16
    chain: tuple[Op, ...] = (Transpose(), Split(1, (1, source[0])), InterleaveHalves())
    rule = Rule("x", source, "x", chain, ("embed_attn", "kv_heads", "kv_head_dim"))
    (leaf,) = leaves(rule, Layout(False))
    tiling = tiles.choose(leaf, 4)
    assert tiling.row_axis is None
    assert tiling.column == leaf.shape == (hidden, 1, source[0])
    assert nbytes(tiling.column, 4) == 2 * COLUMN_BYTES
    assert nbytes(tiling.chunk, 4) <= MAX_CHUNK_BYTES


CHAINS: list[tuple[tuple[Op, ...], tuple[str | None, ...]]] = [
    ((), ("vocab", "embed_vocab")),
    ((Transpose(),), ("embed", "mlp")),
    ((Transpose(),), ("mlp", "embed")),
    ((Transpose(),), ("kv_lora", "kv_heads")),
]


@st.composite
def odd_leaves(draw: st.DrawFn) -> tuple[Leaf, int]:
    """Leaves of any size, up to some GB, with and without stacks."""
    big = st.one_of(st.integers(1, 300), st.integers(1, 20000), st.sampled_from([1, 7, 4096, 7168, 32003, 131101]))
    layers = stacked("layers", draw(st.integers(1, 130))) if draw(st.booleans()) else None
    experts = draw(st.integers(1, 400)) if draw(st.booleans()) else None
    if draw(st.booleans()):
        heads, dim = draw(st.integers(1, 130)), 2 * draw(st.integers(1, 128))
        shape: Shape = (heads * dim, draw(big))
        rotary = draw(st.sampled_from([(), (InterleaveHalves(),), (InterleaveHalves(), Scale(0.1))]))
        chain: tuple[Op, ...] = (Transpose(), Split(1, (heads, dim)), *rotary)
        axes: tuple[str | None, ...] = ("embed_attn", "q_heads", "kv")
        if draw(st.booleans()):
            shape, chain, axes = shape[::-1], (Transpose(), Split(0, (heads, dim))), ("heads", "kv", "embed_attn")
    elif draw(st.booleans()):
        shape, chain, axes = (draw(big),), (), ("norm",)
    else:
        shape = (draw(big), draw(big))
        chain, axes = draw(st.sampled_from(CHAINS))
    rule = Rule("x{layer}{expert}", shape, "x{layers}" if layers else "x", chain, axes, layers, experts)
    layout = Layout(draw(st.booleans()), draw(st.sampled_from([0, 1])))
    return leaves(rule, layout)[0], draw(st.sampled_from([2, 4]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(odd_leaves())
def test_any_leaf(case: tuple[Leaf, int]) -> None:
    leaf, itemsize = case
    tiling = tiles.choose(leaf, itemsize)
    check_structure(leaf, tiling)
    whole, column = nbytes(leaf.shape, itemsize), nbytes(tiling.column, itemsize)
    if tiling.row_axis is not None:
        smallest = nbytes(leaf.element_shape, itemsize) // leaf.shape[tiling.row_axis]
        assert column <= max(COLUMN_BYTES, smallest)
    assert nbytes(tiling.inner, itemsize) <= nbytes(tiling.chunk, itemsize) <= column
    if any(tiling.chunk[axis] % 2 == 0 for axis in range(len(leaf.shape)) if axis not in dict(leaf.stacked)):
        assert nbytes(tiling.chunk, itemsize) <= MAX_CHUNK_BYTES
    # A half of MIN_CHUNK_BYTES on average, beside up to 31 parts of the experts, however small.
    assert grid_size(leaf.shape, tiling.chunk) <= 2 * EXPERT_CHUNKS + 2 * whole // MIN_CHUNK_BYTES


def test_the_tiling_depends_on_shapes_alone() -> None:
    """All hosts, and a resumed run, must choose the same."""
    leaf = model_leaves(MODELS["Kimi-K2"], Layout(True))[5]
    renamed = replace(leaf, path="elsewhere", rule=replace(leaf.rule, source="{layer}", target="y"))
    assert tiles.choose(renamed, 2) == tiles.choose(leaf, 2)
