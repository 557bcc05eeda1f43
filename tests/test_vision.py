"""Encoders of images: MaxText's leaves at full size, every published tensor, and where every element comes from."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import published_models
import pytest
import stored
import tiny_models

from slicecast.configs import families, maxtext
from slicecast.convert.box import Box
from slicecast.convert.errors import ConfigError
from slicecast.convert.mapping import ops, resolve
from slicecast.convert.mapping.rules import ModelOptions, Rule
from slicecast.convert.mapping.target import Layout, Leaf, leaves
from slicecast.convert.verification import against_source

Array: TypeAlias = npt.NDArray[Any]
Config: TypeAlias = dict[str, Any]
Elements: TypeAlias = Callable[..., Array]

MULTIMODAL = ModelOptions(use_multimodal=True)

# By MaxText's name, what the names of the tensors begin with that belong to the encoder of images.
PUBLISHED = {
    "gemma3-4b": ("vision_tower.", "multi_modal_projector."),
    "gemma3-27b": ("vision_tower.", "multi_modal_projector."),
    "gemma4-26b": ("model.vision_tower.", "model.embed_vision."),
    "gemma4-31b": ("model.vision_tower.", "model.embed_vision."),
    "llama4-17b-16e": ("vision_model.", "multi_modal_projector."),
    "llama4-17b-128e": ("vision_model.", "multi_modal_projector."),
    "qwen3.5-35b-a3b": ("model.visual.",),
    "qwen3.5-397b-a17b": ("model.visual.",),
}
ROOT = "params/params/vision_encoder/"


def found_leaves(config: Config, scan_layers: bool) -> dict[str, Leaf]:
    model = families.recognize(config, MULTIMODAL)
    found = [leaf for rule in model.rules for leaf in leaves(rule, Layout(scan_layers))]
    assert len({leaf.path for leaf in found}) == len(found)
    return {leaf.path: leaf for leaf in found}


# ---- Full size


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_leaves_are_exactly_those_of_maxtext(name: str, scan_layers: bool) -> None:
    found = found_leaves(published_models.load(name).config, scan_layers)
    target = {leaf.path: leaf for leaf in maxtext.target_leaves(name, scan_layers, use_multimodal=True)}
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in target.items()}
    vision = [path for path in target if path.startswith(ROOT)]
    assert len(vision) > 300
    for path in vision:
        named = target[path].axes or ()
        assert found[path].axes == (*named, *[None] * (len(found[path].shape) - len(named)))
        # As all norms of Gemma 3, which are published as one less.
        assert found[path].dtype == ("float32" if path.endswith("mm_soft_embedding_norm/scale") else "bfloat16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_is_read_or_left_out(name: str) -> None:
    checkpoint = published_models.checkpoint(name)
    vision = {tensor for tensor in checkpoint.tensors if tensor.startswith(PUBLISHED[name])}
    for use_multimodal in (True, None, False):
        model = families.recognize(checkpoint.config, ModelOptions(use_multimodal=use_multimodal))
        resolved, ignored = resolve.resolve(checkpoint, model, Layout(scan_layers=False), None)
        read = {tensor for each in resolved for source in each.sources.values() for tensor in source.names}
        left_out = {each.why: each.count for each in ignored}
        assert left_out.pop("vision needs --use_multimodal", 0) == (0 if use_multimodal else len(vision))
        assert read & vision == (vision if use_multimodal else set())
        assert len(read) + sum(left_out.values()) + (0 if use_multimodal else len(vision)) == len(checkpoint.tensors)


@pytest.mark.parametrize("use_multimodal", [True, False])
@pytest.mark.parametrize(
    "prefixes",
    [
        ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
        ("language_model.model.", "vision_tower.", "multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    ],
    ids=["published", "transformers 5", "in memory", "transformers 5 in memory"],
)
def test_gemma3_is_spelled_in_four_ways(prefixes: tuple[str, str, str], use_multimodal: bool) -> None:
    published = published_models.checkpoint("gemma3-4b")
    text, tower, projector = prefixes
    tensors = {}
    for name, tensor in published.tensors.items():
        spelled = re.sub(r"^language_model\.model\.", text, name)
        spelled = re.sub(r"^vision_tower\.vision_model\.", tower, spelled)
        spelled = re.sub(r"^multi_modal_projector\.", projector, spelled)
        tensors[spelled] = replace(tensor, name=spelled)
    checkpoint = replace(published, tensors=tensors)
    model = families.recognize(checkpoint.config, ModelOptions(use_multimodal=use_multimodal))
    resolved, ignored = resolve.resolve(checkpoint, model, Layout(scan_layers=False), None)
    assert len(resolved) == len(tensors) - sum(each.count for each in ignored)
    assert sum(each.count for each in ignored) == (0 if use_multimodal else 439)


# ---- Where every element comes from, by index arithmetic

# Of the tiny towers. All sizes that could be confused differ.
WIDTH, HEADS, HEAD_DIM, INNER, PATCH, HIDDEN = 12, 3, 4, 22, 5, 24

_TOWER: Config = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
}
TOWERS: dict[str, Config] = {
    "gemma3": _TOWER | {"image_size": 4 * PATCH},
    "gemma4": _TOWER | {"head_dim": HEAD_DIM, "position_embedding_size": 9, "standardize": True},
    "llama4": _TOWER
    | {"image_size": 4 * PATCH, "projector_input_dim": 14, "projector_output_dim": 18, "vision_output_dim": 20},
    "qwen3.5": {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "depth": 2,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "num_position_embeddings": 9,
        "in_channels": 3,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [],
    },
}


def same(name: str, leaf: str) -> dict[str, Elements]:
    return {leaf: lambda t, *index: t[name][index]}


def norm(name: str, leaf: str) -> dict[str, Elements]:
    return same(f"{name}.weight", f"{leaf}/scale")


def layer_norm(name: str, leaf: str) -> dict[str, Elements]:
    return norm(name, leaf) | same(f"{name}.bias", f"{leaf}/bias")


def kernel(name: str, leaf: str) -> dict[str, Elements]:
    return {f"{leaf}/kernel": lambda t, i, o: t[f"{name}.weight"][o, i]}


def linear(name: str, leaf: str) -> dict[str, Elements]:
    return kernel(name, leaf) | same(f"{name}.bias", f"{leaf}/bias")


def projection(name: str, leaf: str, first_row: int = 0) -> dict[str, Elements]:
    """Queries, keys or values; rows of their heads begin at a row of the tensor."""
    return {f"{leaf}/kernel": lambda t, i, h, d: t[f"{name}.weight"][first_row + h * HEAD_DIM + d, i]}


def projection_bias(name: str, leaf: str, first_row: int = 0) -> dict[str, Elements]:
    return {f"{leaf}/bias": lambda t, h, d: t[f"{name}.bias"][first_row + h * HEAD_DIM + d]}


def out(name: str, leaf: str) -> dict[str, Elements]:
    return {f"{leaf}/kernel": lambda t, h, d, o: t[f"{name}.weight"][o, h * HEAD_DIM + d]}


def attention(name: str, leaf: str, out_name: str) -> dict[str, Elements]:
    """All four projections, with biases."""
    found = out(f"{name}.{out_name}", f"{leaf}/out") | same(f"{name}.{out_name}.bias", f"{leaf}/out/bias")
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
        found |= projection(f"{name}.{letter}_proj", f"{leaf}/{part}")
        found |= projection_bias(f"{name}.{letter}_proj", f"{leaf}/{part}")
    return found


def gemma3() -> dict[str, Elements]:
    source, target = "model.vision_tower.vision_model", "Gemma3VisionEncoderLayer_0"
    patch, positions = (f"{source}.embeddings.{part}_embedding" for part in ("patch", "position"))
    projector = "model.multi_modal_projector"
    found = {
        f"{target}/embedding/kernel": lambda t, y, x, c, o: t[f"{patch}.weight"][o, c, y, x],
        f"{target}/pos_embedding": lambda t, one, p, o: t[f"{positions}.weight"][p, o],
        "VisionEmbedder_0/mm_soft_embedding_norm/scale": (
            lambda t, o: t[f"{projector}.mm_soft_emb_norm.weight"][o].astype(np.float32) + np.float32(1)
        ),
        **same(f"{patch}.bias", f"{target}/embedding/bias"),
        **same(f"{projector}.mm_input_projection_weight", "VisionEmbedder_0/mm_input_projection/w"),
        **layer_norm(f"{source}.post_layernorm", f"{target}/Transformer/encoder_norm"),
    }
    for layer in range(2):
        name, leaf = f"{source}.encoder.layers.{layer}", f"{target}/Transformer/encoderblock_{layer}"
        found |= layer_norm(f"{name}.layer_norm1", f"{leaf}/LayerNorm_0")
        found |= layer_norm(f"{name}.layer_norm2", f"{leaf}/LayerNorm_1")
        found |= attention(f"{name}.self_attn", f"{leaf}/MultiHeadDotProductAttention_0", "out_proj")
        found |= linear(f"{name}.mlp.fc1", f"{leaf}/MlpBlockViT_0/Dense_0")
        found |= linear(f"{name}.mlp.fc2", f"{leaf}/MlpBlockViT_0/Dense_1")
    return found


def gemma4() -> dict[str, Elements]:
    source, target = "model.vision_tower", "Gemma4VisionEncoderLayer_0"
    found = {
        f"{target}/vision_entry/pos_emb_param": (
            lambda t, p, yx, o: t[f"{source}.patch_embedder.position_embedding_table"][yx, p, o]
        ),
        **kernel(f"{source}.patch_embedder.input_proj", f"{target}/vision_entry/input_projection"),
        **same(f"{source}.std_bias", f"{target}/std_bias"),
        **same(f"{source}.std_scale", f"{target}/std_scale"),
        **kernel("model.embed_vision.embedding_projection", "Gemma4VisionProjector_0/projection"),
    }
    for layer in range(2):
        name, leaf = f"{source}.encoder.layers.{layer}", f"{target}/layer_{layer}"
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
            found |= projection(f"{name}.self_attn.{letter}_proj.linear", f"{leaf}/attention/{part}")
        found |= out(f"{name}.self_attn.o_proj.linear", f"{leaf}/attention/out")
        found |= norm(f"{name}.self_attn.q_norm", f"{leaf}/attention/query_norm")
        found |= norm(f"{name}.self_attn.k_norm", f"{leaf}/attention/key_norm")
        found |= norm(f"{name}.input_layernorm", f"{leaf}/pre_attention_norm")
        found |= norm(f"{name}.post_attention_layernorm", f"{leaf}/post_attention_norm")
        found |= norm(f"{name}.pre_feedforward_layernorm", f"{leaf}/pre_ffw_norm")
        found |= norm(f"{name}.post_feedforward_layernorm", f"{leaf}/post_ffw_norm")
        for part, place in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            found |= kernel(f"{name}.mlp.{part}_proj.linear", f"{leaf}/mlp/{place}")
    return found


def llama4() -> dict[str, Elements]:
    source, target = "vision_model", "Llama4VisionModel_0"
    shuffle = f"{target}/Llama4VisionPixelShuffleMLP_0/pixel_shuffle_mlp/vit_pixel_shuffle_mlp"
    found = {
        **same(f"{source}.class_embedding", f"{target}/class_embedding"),
        **same(f"{source}.positional_embedding_vlm", f"{target}/positional_embedding_vlm"),
        **kernel(f"{source}.patch_embedding.linear", f"{target}/Llama4UnfoldConvolution_0/vit_unfold_linear"),
        **layer_norm(f"{source}.layernorm_pre", f"{target}/layernorm_pre"),
        **layer_norm(f"{source}.layernorm_post", f"{target}/layernorm_post"),
        **kernel(f"{source}.vision_adapter.mlp.fc1", f"{shuffle}_fc1"),
        **kernel(f"{source}.vision_adapter.mlp.fc2", f"{shuffle}_fc2"),
        **kernel("multi_modal_projector.linear_1", "Llama4MultiModalProjector_0/vit_multi_modal_projector"),
    }
    for layer in range(2):
        name, leaf = f"{source}.model.layers.{layer}", f"{target}/Llama4VisionEncoder_0/layers_{layer}"
        found |= layer_norm(f"{name}.input_layernorm", f"{leaf}/input_layer_norm")
        found |= layer_norm(f"{name}.post_attention_layernorm", f"{leaf}/post_attention_layer_norm")
        found |= attention(f"{name}.self_attn", f"{leaf}/self_attention_vision", "o_proj")
        found |= linear(f"{name}.mlp.fc1", f"{leaf}/Llama4VisionMLP_0/vit_encoder_layer_mlp_fc1")
        found |= linear(f"{name}.mlp.fc2", f"{leaf}/Llama4VisionMLP_0/vit_encoder_layer_mlp_fc2")
    return found


def qwen() -> dict[str, Elements]:
    source, target = "model.visual", "Qwen3_5MoeVisionEncoder_0"
    patch, merger = f"{source}.patch_embed.proj", "Qwen3_5MoeVisionProjector_0/merger"
    found = {
        f"{target}/patch_embed/proj/kernel": lambda t, f, y, x, c, o: t[f"{patch}.weight"][o, c, f, y, x],
        **same(f"{patch}.bias", f"{target}/patch_embed/proj/bias"),
        **same(f"{source}.pos_embed.weight", f"{target}/pos_embed_interpolate/pos_embed"),
        **layer_norm(f"{source}.merger.norm", f"{merger}/ln_q"),
        **linear(f"{source}.merger.linear_fc1", f"{merger}/mlp_0"),
        **linear(f"{source}.merger.linear_fc2", f"{merger}/mlp_2"),
    }
    for layer in range(2):
        name, leaf = f"{source}.blocks.{layer}", f"{target}/blocks_{layer}"
        found |= layer_norm(f"{name}.norm1", f"{leaf}/ln1")
        found |= layer_norm(f"{name}.norm2", f"{leaf}/ln2")
        for part, place in enumerate(("query", "key", "value")):
            found |= projection(f"{name}.attn.qkv", f"{leaf}/attn/attn/{place}", part * WIDTH)
            found |= projection_bias(f"{name}.attn.qkv", f"{leaf}/attn/attn/{place}", part * WIDTH)
        found |= out(f"{name}.attn.proj", f"{leaf}/attn/attn/out")
        found |= same(f"{name}.attn.proj.bias", f"{leaf}/attn/attn/out/bias")
        found |= linear(f"{name}.mlp.linear_fc1", f"{leaf}/mlp")
        found |= linear(f"{name}.mlp.linear_fc2", f"{leaf}/mlp_out")
    return found


FORMULAS: dict[str, dict[str, Elements]] = {
    "gemma3": gemma3(),
    "gemma4": gemma4(),
    "llama4": llama4(),
    "qwen3.5": qwen(),
}


def tiny(name: str) -> Config:
    """The config of a tiny model with its tower."""
    return tiny_models.CONFIGS[name] | {"vision_config": TOWERS[name]}


def source_of(rule: Rule) -> str:
    assert isinstance(rule.source, str)
    return rule.source


@pytest.mark.parametrize("name", TOWERS)
def test_every_element_is_where_it_belongs(name: str) -> None:
    tensors = {tensor: values for tensor, (_, values) in stored_tensors(tiny(name)).items()}
    vision = {path: leaf for path, leaf in found_leaves(tiny(name), scan_layers=True).items() if path.startswith(ROOT)}
    assert vision.keys() == {ROOT + path for path in FORMULAS[name]}
    for path, leaf in vision.items():
        rule = leaf.rule
        needed = ops.boxes(rule.ops, Box.whole(leaf.shape), rule.shape)[0]
        found = against_source.layout(rule.ops, tensors[source_of(rule)][needed.slices])
        assert found.shape == leaf.shape
        elements = FORMULAS[name][path.removeprefix(ROOT)]
        np.testing.assert_array_equal(found, elements(tensors, *np.indices(leaf.shape, sparse=True)), strict=True)


def stored_tensors(config: Config) -> Mapping[str, tuple[str, Array]]:
    return tiny_models.tensors(families.recognize(config, MULTIMODAL), seed=1)


@pytest.mark.parametrize("scan_layers", ["true", "false"])
@pytest.mark.parametrize("name", TOWERS)
def test_conversion_and_verification(slicecast: Any, tmp_path: Path, name: str, scan_layers: str) -> None:
    source = stored.write(tmp_path / "source", stored_tensors(tiny(name)), tiny(name))
    output = tmp_path / "output"
    slicecast.run(
        "convert",
        f"--hf_model_path={source}",
        f"--base_output_directory={output}",
        f"--scan_layers={scan_layers}",
        "--use_multimodal",
        "--simulated_cpu_devices_count=8",
    )
    done = slicecast.run("verify", output, f"--hf_model_path={source}")
    assert f"{len(found_leaves(tiny(name), scan_layers == 'true'))} leaves" in done.stdout
    assert "all equal to the source, bit for bit" in done.stdout


# ---- Refusals


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-e4b"])
def test_small_gemma4_models_see_nothing_in_maxtext(name: str) -> None:
    config = published_models.load(name).config
    with pytest.raises(ConfigError, match=r"--use_multimodal: MaxText's Gemma 4 E2B and E4B have no vision encoder"):
        families.recognize(config, MULTIMODAL)
    assert families.recognize(config).family == "gemma4"


@pytest.mark.parametrize("name", [*TOWERS, "gemma", "gemma2", "gemma3 text", "llama4 text", "qwen3-next"])
def test_a_config_without_a_tower_is_refused(name: str) -> None:
    config = {field: value for field, value in tiny_models.CONFIGS[name].items() if field != "vision_config"}
    with pytest.raises(ConfigError, match="field 'vision_config' is missing"):
        families.recognize(config, MULTIMODAL)


@pytest.mark.parametrize(
    ("field", "value"), [("standardize", False), ("use_clipped_linears", True), ("attention_bias", True)]
)
def test_towers_that_maxtext_does_not_have_are_refused(field: str, value: bool) -> None:
    config = tiny("gemma4") | {"vision_config": TOWERS["gemma4"] | {field: value}}
    with pytest.raises(ConfigError, match=f"vision_config: field '{field}' is {value}"):
        families.recognize(config, MULTIMODAL)
