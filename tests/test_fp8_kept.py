"""Weights that stay FP8: which code and which scale stands where, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import samples
import stored
import tiny_models

from slicecast.configs import families
from slicecast.convert import orbax_checkpoint
from slicecast.convert.codecs import constant, joined, quantization_config
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.errors import PlanErrors, UnsupportedFormatError
from slicecast.convert.mapping import fp8, resolve
from slicecast.convert.mapping.ops import InterleaveHalves, Op, Scale, Slice, Split, Stride, Transpose
from slicecast.convert.mapping.rules import Model, Rule, stacked
from slicecast.convert.mapping.target import FP8, ROOT, Layout, Leaf, leaves
from slicecast.convert.source.checkpoint import open_checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.verification import definition

Array = np.ndarray[Any, Any]
Stored = dict[str, tuple[str, Array]]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

# Published weights have blocks of 128; these are as small as the models here.
BLOCK = 8
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

PREFIX = "model.language_model.layers"


def quantized(rng: np.random.Generator, name: str, shape: tuple[int, ...], scale: str = "BF16") -> Stored:
    """A weight in FP8 with a scale for each block. It has all codes, those of NaN and of both zeros too."""
    codes = samples.random_bytes(rng, *shape).view(E4M3)
    blocks = tuple(-(-size // BLOCK) for size in shape)
    return {name: ("F8_E4M3", codes), f"{name}_scale_inv": (scale, samples.random_scale(rng, blocks, scale))}


# ---- A model


def tiny_config() -> dict[str, Any]:
    """The tiny Qwen 3.5 with sizes that are whole blocks, one cycle of layers long."""
    config = tiny_models.CONFIGS["qwen3.5"]
    sizes = {"hidden_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "head_dim": 16}
    sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "num_hidden_layers": 4, "num_experts": 3}
    return config | {"text_config": config["text_config"] | sizes, "quantization_config": QUANTIZATION}


def is_quantized(name: str) -> bool:
    """Whether releases have this tensor in FP8: projections, but not those of a few rows, and no embeddings."""
    return name.endswith(("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight"))


@pytest.fixture(scope="module")
def model_tensors() -> Stored:
    """The tensors of the model."""
    rng = np.random.default_rng(0)
    tensors: Stored = {}
    model = families.recognize(tiny_config())
    # Quantized releases have the experts one by one.
    (separate,) = model.other_forms
    for name, (dtype, values) in tiny_models.tensors(replace(model, rules=separate), 3).items():
        tensors |= quantized(rng, name, values.shape) if is_quantized(name) else {name: (dtype, values)}
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model_tensors: Stored) -> Path:
    """The model as a checkpoint."""
    return stored.write(tmp_path_factory.mktemp("source"), model_tensors, tiny_config())


def converted(slicecast: Any, source: Path, output: Path, *flags: str) -> dict[str, Array]:
    """Converts and verifies a checkpoint, over four devices; returns the arrays by path."""
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", *flags]
    slicecast.run("convert", *arguments, "--simulated_cpu_devices_count=4")
    done = slicecast.run("verify", output, f"--hf_model_path={source}")
    assert "all equal to the source, bit for bit" in done.stdout
    arrays = orbax_checkpoint.open_arrays(output)
    return {path.removeprefix(f"{ROOT}/"): array.read().result() for path, array in arrays.items()}


@pytest.fixture(scope="module")
def kept(module_slicecast: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """The model with its weights in FP8, layers stacked."""
    return converted(module_slicecast, source, tmp_path_factory.mktemp("kept"), f"--save_dtype={FP8}")


def assert_same_bits(found: Array, wanted: Array) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()


def codes_and_scales(tensors: Mapping[str, tuple[str, Array]], name: str) -> tuple[Array, Array]:
    """A weight's codes `[out, in]`, and its scales `[out / 8, in / 8]` in float32."""
    return tensors[f"{name}.weight"][1], tensors[f"{name}.weight_scale_inv"][1].astype(np.float32)


def test_which_leaves_are_fp8(kept: dict[str, Array]) -> None:
    """Each has its scales beside it, one for each block; all others are what they are without FP8."""
    codes = {path for path, array in kept.items() if array.dtype == E4M3}
    scales = {path for path in kept if path.endswith("_scale")}
    assert scales == {f"{path}_scale" for path in codes}
    # In each layer three of all experts and three of the shared one; two of linear attention, four of the other.
    assert len(codes) == 4 * (3 + 3) + 3 * 2 + 4
    assert {kept[path].dtype for path in scales} == {np.dtype(np.float32)}
    float32 = {path.rpartition("/")[2] for path, array in kept.items() if array.dtype == np.float32} - {
        path.rpartition("/")[2] for path in scales
    }
    assert float32 == {"A_log", "dt_bias"}


def test_a_matrix(kept: dict[str, Array], model_tensors: Stored) -> None:
    codes, scales = codes_and_scales(model_tensors, f"{PREFIX}.2.linear_attn.out_proj")
    path = "decoder/layers/layer_2/attention/out_proj/kernel"
    assert_same_bits(kept[path], codes.T[:, np.newaxis])
    assert_same_bits(kept[f"{path}_scale"], scales.T[:, np.newaxis])


def test_heads(kept: dict[str, Array], model_tensors: Stored) -> None:
    """`query[i, layer, h, d] = q[32 h + d, i]`; a head of 32 has four blocks."""
    codes, scales = codes_and_scales(model_tensors, f"{PREFIX}.3.self_attn.q_proj")
    path = "decoder/layers/layer_3/attention/attention/query/kernel"
    query, query_scale = kept[path], kept[f"{path}_scale"]
    assert (query.shape, query_scale.shape) == ((48, 1, 4, 32), (6, 1, 4, 4))
    for i, h, d in np.ndindex(48, 4, 32):
        assert query[i, 0, h, d].tobytes() == codes[32 * h + d, i].tobytes()
        assert query_scale[i // 8, 0, h, d // 8] == scales[(32 * h + d) // 8, i // 8]


def test_experts(kept: dict[str, Array], model_tensors: Stored) -> None:
    path = "decoder/layers/layer_1/mlp/routed_experts/wi_0"
    assert (kept[path].shape, kept[f"{path}_scale"].shape) == ((3, 1, 48, 16), (3, 1, 6, 2))
    for expert in range(3):
        codes, scales = codes_and_scales(model_tensors, f"{PREFIX}.1.mlp.experts.{expert}.gate_proj")
        assert_same_bits(kept[path][expert, 0], codes.T)
        assert_same_bits(kept[f"{path}_scale"][expert, 0], scales.T)


def test_joined_projections(kept: dict[str, Array], model_tensors: Stored) -> None:
    """For each of two key heads: 8 rows of queries, 8 of keys, 48 of values, and 48 of gates from another tensor."""
    qkv, qkv_scales = codes_and_scales(model_tensors, f"{PREFIX}.0.linear_attn.in_proj_qkv")
    z, z_scales = codes_and_scales(model_tensors, f"{PREFIX}.0.linear_attn.in_proj_z")
    path = "decoder/layers/layer_0/attention/in_proj_qkvz/kernel"
    codes = [qkv[0:8], qkv[16:24], qkv[32:80], z[0:48], qkv[8:16], qkv[24:32], qkv[80:128], z[48:96]]
    assert_same_bits(kept[path], np.concatenate(codes).T[:, np.newaxis])
    scales = [qkv_scales[0:1], qkv_scales[2:3], qkv_scales[4:10], z_scales[0:6]]
    scales += [qkv_scales[1:2], qkv_scales[3:4], qkv_scales[10:16], z_scales[6:12]]
    assert_same_bits(kept[f"{path}_scale"], np.concatenate(scales).T[:, np.newaxis])


def test_codes_and_scales_give_the_values(slicecast: Any, source: Path, tmp_path: Path, kept: dict[str, Array]) -> None:
    """What MaxText makes of them is what this program makes of the source in bfloat16."""
    values = converted(slicecast, source, tmp_path / "output")
    assert set(values) == {path for path in kept if not path.endswith("_scale")}
    for path, found in values.items():
        if kept[path].dtype != E4M3:
            assert_same_bits(kept[path], found)
            continue
        scale = kept[f"{path}_scale"]
        for axis, size in enumerate(found.shape):
            scale = scale.repeat(size // scale.shape[axis], axis=axis)
        samples.assert_same(found, (kept[path].astype(np.float32) * scale).astype(stored.BF16))


@pytest.mark.parametrize("flags", [["--scan_layers=false"], ["--param_scan_axis=0"]], ids=str)
def test_other_layouts(slicecast: Any, source: Path, tmp_path: Path, kept: dict[str, Array], flags: list[str]) -> None:
    """The scales follow their weights wherever layers stand."""
    found = converted(slicecast, source, tmp_path / "output", f"--save_dtype={FP8}", *flags)
    assert len(found) == len(kept)
    for path, array in kept.items():
        layer_axis = 1 if "layers/" in path else None
        if layer_axis is None:
            assert_same_bits(found[path], array)
        elif flags == ["--scan_layers=false"]:
            assert_same_bits(found[path.replace("layers/layer_", "layers_")], array.squeeze(layer_axis))
        else:
            assert_same_bits(found[path], np.moveaxis(array, layer_axis, 0))


def test_a_checkpoint_without_fp8(slicecast: Any, tmp_path: Path) -> None:
    """Whoever asks for FP8 does not get bfloat16 without being told."""
    source = tiny_models.write(tmp_path / "source", "qwen3")
    done = slicecast.run("plan", f"--hf_model_path={source}", f"--save_dtype={FP8}", check=False)
    assert done.returncode != 0
    assert f"--save_dtype={FP8}: this checkpoint has no FP8 weights to keep" in done.stderr


# ---- Single leaves


@dataclass(frozen=True)
class Weight:
    """A weight in a checkpoint of its own.

    Attributes:
        directory: The checkpoint.
        tensor: How it is stored.
        scales: Its scales.
    """

    directory: Path
    tensor: StoredTensor
    scales: Array


Make = Callable[..., Weight]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that stores a weight."""

    def run(shape: tuple[int, ...] = (16, 24), **options: Any) -> Weight:
        tensors = quantized(np.random.default_rng(0), "m.weight", shape, **options)
        directory = stored.write(tmp_path / "weight", tensors, {"quantization_config": QUANTIZATION})
        return Weight(directory, stored.find(directory, "m.weight", shape), tensors["m.weight_scale_inv"][1])

    return run


def leaf(shape: tuple[int, ...], *ops: Op) -> Leaf:
    """The leaf of a rule."""
    (only,) = leaves(Rule("m.weight", shape, "t", ops, tuple("abcdef"[: len(shape)])), Layout(scan_layers=False))
    return only


@pytest.mark.parametrize("scale", ["BF16", "F32", "F16"])
def test_scales_of_all_dtypes(make: Make, scale: str) -> None:
    """bfloat16 and float16 are float32 numbers."""
    made = make(scale=scale)
    found = fp8.keep(leaf((16, 24), Transpose()), {(): made.tensor})
    assert found is not None
    assert [(each.dtype, each.shape) for each, _ in found] == [(FP8, (24, 16)), ("float32", (3, 2))]
    codes, scales = (sources[()] for _, sources in found)
    whole = definition.rows(Directory(str(made.directory)), made.tensor, 0, 16)
    parts = [definition.rows(Directory(str(made.directory)), tensor, 0, tensor.shape[0]) for tensor in (codes, scales)]
    assert parts[0].dtype == E4M3
    spread = parts[1].astype(np.float32).repeat(BLOCK, 0).repeat(BLOCK, 1)
    np.testing.assert_array_equal(parts[0].astype(np.float32) * spread, whole)


@pytest.mark.parametrize(
    ("ops", "scale_ops"),
    [
        ((), ()),
        ((Transpose(),), (Transpose(),)),
        ((Transpose(), Split(1, (2, 16))), (Transpose(), Split(1, (2, 2)))),
        ((Transpose(), Split(0, (3, 8))), (Transpose(), Split(0, (3, 1)))),
        ((Split(0, (2, 2, 8)), Transpose((0, 1, 3, 2))), (Split(0, (2, 2, 1)), Transpose((0, 1, 3, 2)))),
        ((Slice(0, 16, 32), Transpose()), (Slice(0, 2, 4), Transpose())),
    ],
)
def test_what_moves_weights_moves_scales(make: Make, ops: tuple[Op, ...], scale_ops: tuple[Op, ...]) -> None:
    found = fp8.keep(leaf((32, 24), *ops), {(): make((32, 24)).tensor})
    assert found is not None
    (weight, _), (scales, _) = found
    assert (weight.rule.ops, scales.rule.ops, scales.rule.shape) == (ops, scale_ops, (4, 3))
    assert scales.path == f"{weight.path}_scale"


@pytest.mark.parametrize(
    ("shape", "ops", "words"),
    [
        # A head of 12 rows ends within a block.
        ((24, 24), (Transpose(), Split(1, (2, 12))), "[12] are no whole blocks of 8"),
        ((24, 24), (Slice(0, 12, 24),), "[12, 24] are no whole blocks of 8"),
        ((20, 24), (Transpose(),), "[20, 24] are no whole blocks of 8"),
        ((24, 20), (Transpose(),), "[24, 20] are no whole blocks of 8"),
        ((24, 24), (Stride(0, 0, 2),), "Stride(axis=0, start=0, step=2) takes blocks of 8 x 8 apart"),
        ((24, 24), (Split(0, (3, 8)), InterleaveHalves()), "InterleaveHalves() takes blocks of 8 x 8 apart"),
        ((24, 24), (Scale(0.5),), "Scale(factor=0.5) takes blocks of 8 x 8 apart"),
    ],
)
def test_blocks_that_do_not_stay_together(make: Make, shape: tuple[int, ...], ops: tuple[Op, ...], words: str) -> None:
    with pytest.raises(UnsupportedFormatError) as caught:
        fp8.keep(leaf(shape, *ops), {(): make(shape).tensor})
    message = str(caught.value)
    assert words in message
    assert f"'{ROOT}/t'" in message
    assert "Use --save_dtype=bfloat16." in message


OTHER_FORMATS = ["mxfp8", "fp8 a tensor", "fp8 a row", "fp8 e5m2", "fp8 blocks ue8m0", "int8 asymmetric", "int4"]
OTHER_FORMATS += ["nvfp4", "mxfp4 f4", "gptq v1", "awq", "bnb nf4", "mlx"]


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_weights_that_are_quantized_in_another_way(tmp_path: Path, name: str) -> None:
    """Also in square blocks whose scales are bytes: MaxText has no such scales."""
    sample = samples.MAKERS[name](np.random.default_rng(0))
    tensor = stored.find(sample.write(tmp_path), sample.name, sample.shape)
    with pytest.raises(UnsupportedFormatError, match=r"leaf 'params/params/t': .* Use --save_dtype=bfloat16"):
        fp8.keep(leaf(sample.shape), {(): tensor})


@pytest.mark.parametrize(("dtype", "numbers"), [("F8_E5M2", ml_dtypes.float8_e5m2), ("I8", np.int8)])
def test_other_codes_in_square_blocks(tmp_path: Path, dtype: str, numbers: Any) -> None:
    """Their bytes would be other numbers in E4M3."""
    tensors = quantized(np.random.default_rng(0), "m.weight", (16, 24))
    tensors["m.weight"] = (dtype, tensors["m.weight"][1].view(numbers))
    directory = stored.write(tmp_path, tensors, {"quantization_config": QUANTIZATION})
    with pytest.raises(UnsupportedFormatError, match="stored in another way"):
        fp8.keep(leaf((16, 24)), {(): stored.find(directory, "m.weight", (16, 24))})


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """Eight of them could be taken for a block."""
    rng = np.random.default_rng(0)
    shape = (8, 16, 24)
    codes = rng.standard_normal(shape, np.float32).astype(E4M3)
    tensors = {"m.weight": ("F8_E4M3", codes), "m.weight_scale_inv": ("F32", samples.random_scale(rng, (8, 2, 3)))}
    directory = stored.write(tmp_path, tensors, {"quantization_config": QUANTIZATION})
    with pytest.raises(UnsupportedFormatError, match="stored in another way"):
        fp8.keep(leaf(shape), {(): stored.find(directory, "m.weight", shape)})


def test_what_is_not_quantized_stays_what_it_is(tmp_path: Path) -> None:
    """Also what is made up, and whole numbers."""
    directory = stored.write(tmp_path, {"m.weight": ("BF16", np.zeros((16, 24), stored.BF16))}, {})
    plain = stored.find(directory, "m.weight", (16, 24))
    assert fp8.keep(leaf((16, 24)), {(): plain}) is None
    assert fp8.keep(leaf((16, 24)), {(): joined.stored("made", (16, 24), [plain], ((0, 0, 16),), 2)}) is None
    assert fp8.keep(leaf((16, 24)), {(): constant.stored("made", (16, 24), 1.0)}) is None


@pytest.mark.parametrize("odd_one", [0, 1])
def test_layers_that_are_stored_differently(tmp_path: Path, odd_one: int) -> None:
    """Of one leaf all are FP8 or none: a scale for some of the layers would leave the others without."""
    rng = np.random.default_rng(0)
    tensors = quantized(rng, f"m.{1 - odd_one}.weight", (16, 24))
    tensors[f"m.{odd_one}.weight"] = ("BF16", np.zeros((16, 24), stored.BF16))
    rule = Rule("m.{layer}.weight", (16, 24), "{layers}/t", (Transpose(),), ("in", "out"), stacked("layers", 2))
    directory = stored.write(tmp_path, tensors, {"quantization_config": QUANTIZATION})
    with pytest.raises(PlanErrors) as caught:
        resolved(directory, rule, Layout(scan_layers=True, save_dtype=FP8))
    (error,) = caught.value.errors
    assert "leaf 'params/params/layers/t'" in str(error)
    assert "in all layers" in str(error)
    # A layer that stands alone may be what it is.
    found = resolved(directory, rule, Layout(scan_layers=False, save_dtype=FP8))
    dtypes = {item.leaf.path.removeprefix(f"{ROOT}/"): item.leaf.dtype for item in found}
    quantized_one = f"layers_{1 - odd_one}/t"
    assert dtypes == {f"layers_{odd_one}/t": "bfloat16", quantized_one: FP8, f"{quantized_one}_scale": "float32"}


def resolved(directory: Path, rule: Rule, layout: Layout) -> list[resolve.ResolvedLeaf]:
    """The leaves of one rule."""
    checkpoint = open_checkpoint(str(directory))
    announced = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    found, _ = resolve.resolve(checkpoint, Model("made up", "a model", [rule]), layout, announced)
    return found


def test_tensors_that_are_joined_must_be_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = quantized(rng, "a.weight", (16, 24)) | {"b.weight": ("BF16", np.zeros((16, 24), stored.BF16))}
    directory = stored.write(tmp_path, tensors, {"quantization_config": QUANTIZATION})
    parts = [stored.find(directory, f"{name}.weight", (16, 24)) for name in "ab"]
    tensor = joined.stored("made", (32, 24), parts, ((0, 0, 16), (1, 0, 16)), 1)
    with pytest.raises(UnsupportedFormatError, match="stored in another way"):
        fp8.keep(leaf((32, 24)), {(): tensor})


@pytest.mark.parametrize(
    ("takes", "groups"),
    [
        # Twelve rows and four: together two blocks, but the first take ends within one.
        (((0, 0, 12), (0, 12, 16)), 1),
        # Sixteen rows in four turns are four rows each time.
        (((0, 0, 16), (0, 16, 32)), 4),
    ],
)
def test_rows_that_are_joined_must_be_whole_blocks(make: Make, takes: Any, groups: int) -> None:
    rows = sum(stop - start for _, start, stop in takes)
    tensor = joined.stored("made", (rows, 24), [make((32, 24)).tensor], takes, groups)
    with pytest.raises(UnsupportedFormatError, match=r"'made': .* no whole blocks of 8"):
        fp8.keep(leaf((rows, 24)), {(): tensor})


def test_scales_of_joined_tensors(make: Make) -> None:
    """In two turns one block of the first rows and two of the others."""
    made = make((48, 24))
    tensor = joined.stored("made", (48, 24), [made.tensor], ((0, 32, 48), (0, 0, 32)), 2)
    found = fp8.keep(leaf((48, 24)), {(): tensor})
    assert found is not None
    (scales,) = found[1][1].values()
    assert scales.shape == (6, 3)
    assert_same_bits(definition.rows(Directory(str(made.directory)), scales, 0, 6), made.scales[[4, 0, 1, 5, 2, 3]])
