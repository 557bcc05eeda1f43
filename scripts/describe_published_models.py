"""Writes the lists of tensors in `tests/data/models`: what the checkpoint of each model that MaxText trains looks like.

    JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 .venv/bin/python scripts/describe_published_models.py [NAME ...]

A file has the name of a MaxText model. Its `repository`, `config` and `source` are written by hand: `config` holds
those fields of the published `config.json` that define shapes and rules, and `source` says where they come from. This
script fills in `tensors`, from `config` and nothing of slicecast:

* transformers' own class, of full size and without memory, gives names and shapes;
* transformers' `revert_weight_conversion` turns its names in memory into those on disk, and splits what it fuses;
* `RELEASES` below adds what a release has beyond that class: layers that predict further tokens, a head that is stored
  though it is tied, types other than the config's, and quantization. What is typed there is known from the publishers'
  own code and files; each function says which.

An entry of `tensors` is a pattern of names, a dtype as safetensors spells it, a shape, and for each `{}` of the pattern
the numbers that it stands for, as slices: `3:61`, `3:60:4`, or `0:3,4:7`.
"""

import argparse
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "models"

Config: TypeAlias = dict[str, Any]
# Dtype and shape of each tensor, by name.
Tensors: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
Edit: TypeAlias = Callable[[Tensors, Config], Tensors]

# A layer or an expert: a part of a name that is a number.
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# How safetensors spells the types of torch that occur.
DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.int64": "I64"}

# Architectures that transformers does not have, or has under another name.
ALIASES = {
    "WeaverForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "WeaverOmniForConditionalGeneration": "Qwen3VLForConditionalGeneration",
}


def in_transformers(config: Config, *, on_disk: bool = True) -> Tensors:
    """The tensors that transformers would save; with `on_disk=False`, under the names that they have in memory."""
    architecture = config["architectures"][0]
    model_class = getattr(transformers, ALIASES.get(architecture, architecture))
    # A quantization section would ask for that library; a model type may be the publisher's own.
    plain = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    dtype = getattr(torch, _dtype(config))
    with torch.device("meta"):
        model = model_class._from_config(model_class.config_class(**plain), dtype=dtype)
    # Without duplicates: what is tied to another tensor is not stored.
    stored = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    if on_disk:
        state = revert_weight_conversion(model, state)
    return {name: (DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in state.items()}


def _dtype(config: Config) -> str:
    for section in (config, config.get("text_config", {}), config.get("thinker_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                return str(section[key])
    return "bfloat16"  # gpt-oss does not say.


# ---- What releases have beyond transformers' classes


def renamed(*rules: tuple[str, str]) -> Edit:
    """Replaces regular expressions in all names."""

    def edit(tensors: Tensors, config: Config) -> Tensors:
        found = {}
        for name, value in tensors.items():
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            found[name] = value
        return found

    return edit


def retyped(dtype: str, pattern: str) -> Edit:
    """Stores the tensors that a regular expression finds in another dtype."""

    def edit(tensors: Tensors, config: Config) -> Tensors:
        return {name: (dtype if re.search(pattern, name) else old, shape) for name, (old, shape) in tensors.items()}

    return edit


def tied_head_stored(tensors: Tensors, config: Config) -> Tensors:
    """Qwen3-0.6B is tied and stores its head all the same: its file has 1.5 GB, 752 million parameters."""
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def rotary_frequencies(tensors: Tensors, config: Config) -> Tensors:
    """Llama 2 was saved when transformers still stored the frequencies of the rotary embedding, in float32."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config["num_hidden_layers"])]
    return {**tensors, **dict.fromkeys(names, ("F32", (half,)))}


def shared_keys_stored(tensors: Tensors, config: Config) -> Tensors:
    """Gemma 4's small models have keys and values in all layers, though the last ones reuse those of earlier layers.

    transformers ignores them when it loads: `Gemma4TextModel` lists them as unexpected names.
    """
    text = config["text_config"]
    own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    parts = ("k_norm", "k_proj", "v_proj")
    added: Tensors = {}
    for layer in range(own, text["num_hidden_layers"]):
        # The last layer before them that has the same attention, and so the same shapes.
        like = max(i for i in range(own) if text["layer_types"][i] == text["layer_types"][layer])
        for part in parts:
            name = "model.language_model.layers.{}.self_attn." + part + ".weight"
            added[name.format(layer)] = tensors[name.format(like)]
    return {**tensors, **added}


def experts_transposed(tensors: Tensors, config: Config) -> Tensors:
    """Qwen3-VL's experts have the input first on disk. transformers 5 turns them when it loads, and never back."""
    return {
        name: (dtype, (shape[0], shape[2], shape[1]) if ".mlp.experts." in name else shape)
        for name, (dtype, shape) in tensors.items()
    }


def deepseek_next_tokens(tensors: Tensors, config: Config) -> Tensors:
    """DeepSeek-V3's README_WEIGHTS.md: one more MoE layer, with norms, a projection, and its own copy of both ends."""
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    added = _copied(tensors, f"model.layers.{last - 1}.", f"model.layers.{last}.")
    ends = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    added |= {f"model.layers.{last}.{name}": tensors[end] for name, end in ends.items()}
    added |= {f"model.layers.{last}.{name}.weight": ("BF16", (hidden,)) for name in ("enorm", "hnorm")}
    added[f"model.layers.{last}.shared_head.norm.weight"] = ("BF16", (hidden,))
    added[f"model.layers.{last}.eh_proj.weight"] = ("BF16", (hidden, 2 * hidden))
    return {**tensors, **added}


def qwen_next_tokens(tensors: Tensors, config: Config) -> Tensors:
    """As qwen3_next_mtp.py and qwen3_5_mtp.py of vLLM read it: one more layer, of full attention, under `mtp`."""
    text = config.get("text_config", config)
    base, hidden = "model.language_model" if "text_config" in config else "model", text["hidden_size"]
    full_attention = text["full_attention_interval"] - 1
    added = _copied(tensors, f"{base}.layers.{full_attention}.", "mtp.layers.0.")
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    added |= {f"mtp.{name}.weight": ("BF16", (hidden,)) for name in norms}
    added["mtp.fc.weight"] = ("BF16", (hidden, 2 * hidden))
    return {**tensors, **added}


def deepseek_v4_next_tokens(tensors: Tensors, config: Config) -> Tensors:
    """The last shard of DeepSeek-V4-Flash, 1575 tensors: one more layer, without a compressor, under `mtp.0`."""
    hidden = config["hidden_size"]
    added = {
        name: value
        for name, value in _copied(tensors, f"layers.{config['num_hidden_layers'] - 1}.", "mtp.0.").items()
        if ".compressor." not in name and ".indexer." not in name
    }
    added |= {f"mtp.0.{name}.weight": ("BF16", (hidden,)) for name in ("enorm", "hnorm", "norm")}
    added |= {f"mtp.0.{name}.weight": ("BF16", (hidden, hidden)) for name in ("e_proj", "h_proj")}
    added |= {f"mtp.0.{name}": tensors[name] for name in ("hc_head_fn", "hc_head_base", "hc_head_scale")}
    return {**tensors, **added}


def _copied(tensors: Tensors, prefix: str, to: str) -> Tensors:
    return {to + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# ---- Quantization


def fp8_blocks(skip: str, *, scale: str = "weight_scale_inv", scale_dtype: str = "F32") -> Edit:
    """Every matrix in FP8 with a scale for 128 x 128 values, but those whose names `skip` finds."""

    def edit(tensors: Tensors, config: Config) -> Tensors:
        block = config["quantization_config"]["weight_block_size"]
        found: Tensors = {}
        for name, (dtype, shape) in tensors.items():
            matrix = name.endswith(".weight") and len(shape) == 2 and dtype == "BF16" and not re.search(skip, name)
            found[name] = ("F8_E4M3", shape) if matrix else (dtype, shape)
            if matrix:
                scales = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
                found[name.removesuffix("weight") + scale] = (scale_dtype, scales)
        return found

    return edit


def deepseek_v4_experts(tensors: Tensors, config: Config) -> Tensors:
    """DeepSeek-V4's routed experts in FP4: two values in an I8, a scale for 32 values."""
    found: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if ".experts." in name:
            rows, columns = shape
            found[name] = ("I8", (rows, columns // 2))
            found[name.removesuffix("weight") + "scale"] = ("F8_E8M0", (rows, columns // 32))
        else:
            found[name] = (dtype, shape)
    return found


def gpt_oss_experts(tensors: Tensors, config: Config) -> Tensors:
    """OpenAI's experts in MXFP4, output features first: 16 bytes and a scale for 32 values of the input."""
    found: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if re.search(r"\.experts\.(gate_up|down)_proj$", name):
            experts, inputs, outputs = shape
            found[f"{name}_blocks"] = ("U8", (experts, outputs, inputs // 32, 16))
            found[f"{name}_scales"] = ("U8", (experts, outputs, inputs // 32))
        else:
            found[name] = (dtype, shape)
    return found


DEEPSEEK_FP8 = fp8_blocks(r"embed_tokens|lm_head|\.mlp\.gate\.|eh_proj|shared_head|indexer\.weights_proj")
QWEN_FP8 = fp8_blocks(
    r"embed_tokens|lm_head|visual|\.mlp\.gate\.|shared_expert_gate|in_proj_[ab]\.|mtp\.fc\.", scale_dtype="BF16"
)
# What DeepSeek-V4's inference/model.py computes in float32 and marks as stored in bfloat16 is bfloat16 here.
DEEPSEEK_V4: tuple[Edit, ...] = (
    # Where transformers' table of names does not lead back to the names of the release.
    renamed(
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.", ""),
        (r"^(hc_)(fn|base|scale)$", r"\1head_\2"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ),
    retyped("F32", r"hc_(attn|ffn|head)_|attn_sink|gate\.bias|\.ape$"),
    deepseek_v4_next_tokens,
    deepseek_v4_experts,
    fp8_blocks(r"^embed\.|^head\.|ffn\.gate\.|compressor\.|weights_proj", scale="scale", scale_dtype="F8_E8M0"),
)
# transformers' table of names for NVIDIA's Cosmos3, which MaxText's Weaver shares, backwards.
WEAVER = renamed(
    (r"^model\.(language_model|visual)\.", ""),
    (r"\.self_attn\.o_proj\.", ".self_attn.to_out."),
    (r"\.self_attn\.([qkv])_proj\.", r".self_attn.to_\1."),
    (r"\.self_attn\.([qk])_norm\.", r".self_attn.norm_\1."),
)
# Qwen3.5 computes its state space in float32 and stores it so: `mamba_ssm_dtype`.
QWEN_3_5: tuple[Edit, ...] = (retyped("F32", r"linear_attn\.(A_log|norm\.weight)$"), qwen_next_tokens)

# DeepSeek's and Kimi's bias of the router, whatever transformers makes of it.
ROUTER_BIAS = retyped("F32", r"e_score_correction_bias$")
# transformers 5 has removed a level of names from its SigLIP; the files are older.
SIGLIP = renamed((r"^vision_tower\.", "vision_tower.vision_model."))

# The edits of each release, in their order; those that are not here are as transformers saves them.
RELEASES: dict[str, tuple[Edit, ...]] = {
    "deepseek3-671b": (ROUTER_BIAS, deepseek_next_tokens, DEEPSEEK_FP8),
    "deepseek3.2-671b": (ROUTER_BIAS, retyped("F32", r"indexer\.k_norm"), deepseek_next_tokens, DEEPSEEK_FP8),
    "deepseek4-284b": DEEPSEEK_V4,
    "gemma3-27b": (SIGLIP,),
    "gemma3-4b": (SIGLIP,),
    "gemma4-e2b": (shared_keys_stored,),
    "gemma4-e4b": (shared_keys_stored,),
    "gpt-oss-120b": (gpt_oss_experts,),
    "gpt-oss-20b": (gpt_oss_experts,),
    "kimi-k2-1t": (ROUTER_BIAS, DEEPSEEK_FP8),
    "llama2-7b": (rotary_frequencies,),
    "qwen3-0.6b": (tied_head_stored,),
    "qwen3-next-80b-a3b": (qwen_next_tokens,),
    "qwen3-vl-30b-a3b": (experts_transposed,),
    "qwen3.5-35b-a3b": QWEN_3_5,
    "qwen3.5-35b-a3b-fp8": (*QWEN_3_5, QWEN_FP8),
    "qwen3.5-397b-a17b": QWEN_3_5,
    "qwen3.5-397b-a17b-fp8": (*QWEN_3_5, QWEN_FP8),
    "weaver-max": (WEAVER,),
    "weaver-mini": (WEAVER,),
}
# transformers would split these experts: it shares a table with Qwen2-MoE. Only the FP8 releases store them one by one.
FUSED_ON_DISK = ("qwen3.5-35b-a3b", "qwen3.5-397b-a17b")


def published(name: str, config: Config) -> Tensors:
    """Every tensor of the model's checkpoint."""
    tensors = in_transformers(config, on_disk=name not in FUSED_ON_DISK)
    for edit in RELEASES.get(name, ()):
        tensors = edit(tensors, config)
    return tensors


# ---- The file


def compact(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...], list[str]]]:
    """The same tensors as patterns of names, in the order of the first of each."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, (dtype, shape) in tensors.items():
        numbers = tuple(map(int, NUMBER.findall(name)))
        pattern = NUMBER.sub("{}", name)
        groups.setdefault((pattern, dtype, shape), []).append(numbers)
    entries = []
    for (pattern, dtype, shape), members in groups.items():
        axes = [sorted(set(axis)) for axis in zip(*members, strict=True)]
        assert math.prod(len(axis) for axis in axes) == len(members), f"{pattern}: not every combination is there"
        entries.append((pattern, dtype, shape, [_slices(axis) for axis in axes]))
    return entries


def _slices(numbers: Sequence[int]) -> str:
    """One slice if the numbers are evenly spaced, else one for each run of neighbors."""
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}:{numbers[-1] + 1}:{steps.pop()}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return ",".join(f"{start}:{stop}" for start, stop in runs)


def pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each field, and lists on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    fields = [f"{inner}{json.dumps(key)}: {pretty(field, inner)}" for key, field in value.items()]
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


def rewrite(path: Path) -> int:
    """Fills in the tensors of one file; returns how many there are."""
    content = json.loads(path.read_text())
    del content["tensors"]
    tensors = published(path.stem, content["config"])
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in compact(tensors))
    path.write_text(pretty(content).removesuffix("\n}") + ',\n  "tensors": [\n' + lines + "\n  ]\n}\n")
    return len(tensors)


def main(names: Iterable[str]) -> None:
    """Fills in the tensors of these models' files."""
    logging.disable(logging.WARNING)  # transformers says a lot about fields that it does not know.
    for name in names:
        print(f"{name:24}{rewrite(FOLDER / f'{name}.json'):>8} tensors", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the lists of tensors in tests/data/models.")
    parser.add_argument("names", nargs="*", help="MaxText's names of models; all, without any")
    main(parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.json")))
