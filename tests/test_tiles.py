"""How leaves are cut: the promises of `tiles.py` for every leaf of the real models, and for odd sizes."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.configs import families
from slicecast.convert import tiles
from slicecast.convert.box import Box, Shape, grid_size
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import InterleaveHalves, Op, Scale, Split, Transpose
from slicecast.convert.mapping.rules import Rule, stacked
from slicecast.convert.mapping.target import Layout, Leaf, leaves
from slicecast.convert.sharding import Sharding, axis_rules
from slicecast.convert.tiles import (
    COLUMN_BYTES,
    DEFAULT_READERS,
    MAX_CHUNK_BYTES,
    MAX_INNER_BYTES,
    REQUEST_BYTES,
    Tiling,
)

MIB = 1 << 20
LEAST_INNER_BYTES = REQUEST_BYTES // max(reader.pieces for reader in DEFAULT_READERS)
LEAST_INNER_BYTES_IF_GIVEN = REQUEST_BYTES // tiles.PIECES_IF_GIVEN
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
    "Kimi-K2": 150_000,
    "DeepSeek-V3": 100_000,
    "DeepSeek-V2-Lite": 4_000,
    "gpt-oss-120B": 16_000,
    "gpt-oss-20B": 4_000,
    "Llama-2-7B": 2_000,
    "Llama-3.1-8B": 2_000,
    "Llama-3.1-70B": 12_000,
    "Llama-3.1-405B": 60_000,
    "Mistral-7B": 2_000,
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


@functools.cache
def scanned_leaves(name: str) -> tuple[Leaf, ...]:
    """The leaves of a model as it is by default."""
    return tuple(model_leaves(MODELS[name], Layout(True)))


@functools.cache
def default_tilings(name: str) -> tuple[Tiling, ...]:
    """How these are cut if no mesh is given."""
    return tuple(tiles.choose(leaf, ITEM_BYTES[leaf.dtype]) for leaf in scanned_leaves(name))


def amplification(leaves: Sequence[Leaf], tilings: Sequence[Tiling], sharding: Sharding) -> float:
    """How many bytes a chip reads of a model for each byte that it needs."""
    read = needed = 0.0
    for leaf, tiling in zip(leaves, tilings, strict=True):
        read += tiles.elements_read(leaf, tiling, sharding) * ITEM_BYTES[leaf.dtype]
        needed += nbytes(leaf.shape, ITEM_BYTES[leaf.dtype]) / math.prod(sharding.parts(leaf))
    return read / needed


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
        assert nbytes(tiling.inner, itemsize) >= min(LEAST_INNER_BYTES, nbytes(tiling.column, itemsize))
        # Chunks are put together from whole divisors, so they can be smaller than asked for.
        assert nbytes(tiling.chunk, itemsize) >= min(MIB, nbytes(tiling.column, itemsize))
    # Chunks are 8 MiB or more on average, beside the small leaves that are one chunk each.
    assert chunks <= count + total // (8 * MIB)
    if layout.save_dtype == "bfloat16" and layout.param_scan_axis == 1:
        assert chunks <= CHUNKS[name]


# A chip of one of these reads at most 1.2 times what it needs, and so does a host, whichever chips it has: they read
# what they share once.
COMMON_MESHES: tuple[dict[str, int], ...] = (
    {},
    *({"fsdp": size} for size in (4, 8, 16, 32, 64)),
    *({"expert": size} for size in (2, 4, 8, 16)),
    *({"fsdp": fsdp, "expert": expert} for fsdp, expert in ((4, 4), (8, 2), (2, 8), (16, 4), (8, 8), (32, 2), (4, 16))),
    {"fsdp": 8, "context": 4},
)
# The default cuts no leaf further than is worth a request; these are for more chips, or cut other axes.
OTHER_MESHES: tuple[dict[str, int], ...] = (
    {"fsdp": 256},
    {"fsdp": 16, "expert": 16},
    {"fsdp": 32, "tensor": 2},
    {"fsdp": 16, "tensor": 4},
    {"fsdp": 8, "fsdp_transpose": 4},
    {"tensor": 8},
    {"tensor": 8, "expert": 8},
)


@pytest.mark.parametrize("mesh", COMMON_MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_default_reads_little_in_vain(name: str, mesh: dict[str, int]) -> None:
    assert 1 <= amplification(scanned_leaves(name), default_tilings(name), Sharding(mesh, axis_rules())) <= 1.2


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        # Few weights of these are outside of the experts, which both axes cut.
        *((name, {"fsdp": 16, "expert": 16}) for name in ("Kimi-K2", "DeepSeek-V3", "gpt-oss-120B")),
        *((name, {"fsdp": 16, "tensor": 4}) for name in ("Llama-3.1-70B", "Llama-3.1-405B")),
        *((name, {"fsdp": 32, "tensor": 2}) for name in ("Kimi-K2", "DeepSeek-V3", "gpt-oss-120B", "Llama-3.1-70B")),
    ],
)
def test_the_default_suits_more_meshes_of_large_models(name: str, mesh: dict[str, int]) -> None:
    assert 1 <= amplification(scanned_leaves(name), default_tilings(name), Sharding(mesh, axis_rules())) <= 1.2


@pytest.mark.parametrize("mesh", COMMON_MESHES + OTHER_MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_cut_for_a_mesh_reads_little_in_vain(name: str, mesh: dict[str, int]) -> None:
    """Nothing but of leaves, such as norms, whose shards are too small to be read alone."""
    sharding = Sharding(mesh, axis_rules())
    found = [tiles.choose(leaf, ITEM_BYTES[leaf.dtype], sharding) for leaf in scanned_leaves(name)]
    refused = False
    for leaf, tiling in zip(scanned_leaves(name), found, strict=True):
        check_structure(leaf, tiling)
        assert nbytes(tiling.column, ITEM_BYTES[leaf.dtype]) <= COLUMN_BYTES
        assert nbytes(tiling.inner, ITEM_BYTES[leaf.dtype]) <= MAX_INNER_BYTES
        parts = sharding.parts(leaf)
        shard = [size // number for size, number in zip(leaf.shape, parts, strict=True)]
        if any(size % number for size, number in zip(leaf.shape, parts, strict=True)):
            refused = True
        elif any(size % inner for size, inner in zip(shard, tiling.inner, strict=True)):
            common = [math.gcd(size, inner) for size, inner in zip(shard, tiling.inner, strict=True)]
            assert nbytes(tuple(common), ITEM_BYTES[leaf.dtype]) < LEAST_INNER_BYTES_IF_GIVEN
    if refused:
        with pytest.raises(TargetError, match="does not divide"):
            sharding.check(scanned_leaves(name))
    else:
        assert 1 <= amplification(scanned_leaves(name), found, sharding) <= 1.1


def test_elements_read_of_cuts_that_do_not_meet() -> None:
    """Of 12 rows, 3 parts of 4; with tiles of 6, the first reads 6 rows, the second 12, the third 6."""
    (leaf,) = leaves(Rule("x", (12, 8), "x", (), ("embed", None)), Layout(False))
    tiling = Tiling((12, 8), (6, 4), 0, (12, 8))
    assert tiles.elements_read(leaf, tiling, Sharding({"fsdp": 3}, axis_rules())) == 8 * (6 + 12 + 6) / 3
    assert tiles.elements_read(leaf, tiling, Sharding({"fsdp": 2}, axis_rules())) == 8 * 6
    assert tiles.elements_read(leaf, tiling, Sharding({}, axis_rules())) == 8 * 12


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
        # Four experts are 112 MiB, the largest number that stays under COLUMN_BYTES; a shard of fsdp 64 has 112 rows,
        # and half of the columns are 0.9 MiB, the least that tensor parallelism gets. Eight of each are 14 MiB.
        (True, "MoeBlock_0/wi_0", Tiling((4, 1, 896, 2048), (4, 1, 112, 1024), 3, (4, 1, 7168, 2048))),
        (True, "MoeBlock_0/wi_1", Tiling((4, 1, 896, 2048), (4, 1, 112, 1024), 3, (4, 1, 7168, 2048))),
        (True, "MoeBlock_0/wo", Tiling((4, 1, 1024, 1792), (4, 1, 1024, 112), 3, (4, 1, 2048, 7168))),
        (False, "MoeBlock_0/wi_0", Tiling((4, 896, 2048), (4, 112, 1024), 2, (4, 7168, 2048))),
        (False, "MoeBlock_0/wo", Tiling((4, 1024, 1792), (4, 1024, 112), 2, (4, 2048, 7168))),
        (True, "gate/bias", Tiling((60, 384), (60, 384), 1, (60, 384))),
        (True, "token_embedder/embedding", Tiling((8192, 896), (8192, 112), 0, (8192, 7168))),
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
        # The rows of the source are the experts: 8 are 127 MiB. 2 of 32 are a 16th, 45 rows a 64th of the embedding.
        (True, "layers_1/GptOssMlp/wi_1", Tiling((2, 1, 1440, 2880), (2, 1, 45, 2880), 0, (8, 1, 2880, 2880))),
        (False, "layers_23/GptOssMlp/wi_1", Tiling((2, 1440, 2880), (2, 45, 2880), 0, (8, 2880, 2880))),
        (True, "layers_0/GptOssMlp/wo", Tiling((2, 1, 2880, 1440), (2, 1, 2880, 45), 0, (8, 1, 2880, 2880))),
        # The whole leaf is 2.1 MiB, of which a 16th is too small.
        (True, "layers_1/GptOssMlp/wi_1_bias", Tiling((32, 12, 2880), (4, 12, 2880), 0, (32, 12, 2880))),
        (True, "layers_1/GptOssAttention/sinks", Tiling((64, 12), (64, 12), 0, (64, 12))),
    ],
)
def test_gpt_oss_spelled_out(scan: bool, suffix: str, expected: Tiling) -> None:
    leaf = next(leaf for leaf in model_leaves(MODELS["gpt-oss-20B"], Layout(scan)) if leaf.path.endswith(suffix))
    assert tiles.choose(leaf, 2) == expected


def test_a_kimi_expert_chunk_is_14_mib() -> None:
    leaf = next(x for x in model_leaves(MODELS["Kimi-K2"], Layout(True)) if x.path.endswith("MoeBlock_0/wi_0"))
    tiling = tiles.choose(leaf, 2)
    assert nbytes(tiling.column, 2) == 112 * MIB
    assert nbytes(tiling.chunk, 2) == 14 * MIB
    assert nbytes(tiling.inner, 2) == 7 * MIB // 8
    assert grid_size(leaf.shape, tiling.chunk) == 96 * 60 * 8


def test_kimi_cut_for_meshes_spelled_out() -> None:
    leaf = next(x for x in model_leaves(MODELS["Kimi-K2"], Layout(True)) if x.path.endswith("MoeBlock_0/wi_0"))

    def inner(mesh: dict[str, int]) -> Shape:
        return tiles.choose(leaf, 2, Sharding(mesh, axis_rules())).inner

    assert inner({"fsdp": 256}) == (4, 1, 28, 2048)
    assert inner({"expert": 64, "fsdp": 4}) == (3, 1, 896, 1024)  # The whole shard is 6 experts, 126 MiB.
    assert inner({"fsdp": 16, "tensor": 4}) == (4, 1, 448, 512)
    assert inner({"fsdp": 8, "fsdp_transpose": 8}) == (4, 1, 896, 256)


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
        assert nbytes(tiling.inner, itemsize) >= min(LEAST_INNER_BYTES, nbytes(tiling.column, itemsize))
    assert chunks <= 2 * count + total // MIB


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
    assert nbytes(tiling.inner, itemsize) >= min(LEAST_INNER_BYTES, column)
    # Beside up to 31 parts of the experts, however small.
    assert grid_size(leaf.shape, tiling.chunk) <= 31 + 4 * whole // LEAST_INNER_BYTES


def test_the_tiling_depends_on_shapes_alone() -> None:
    """All hosts, and a resumed run, must choose the same."""
    leaf = model_leaves(MODELS["Kimi-K2"], Layout(True))[5]
    renamed = replace(leaf, path="elsewhere", rule=replace(leaf.rule, source="{layer}", target="y"))
    assert tiles.choose(renamed, 2) == tiles.choose(leaf, 2)
