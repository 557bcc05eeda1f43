"""Writes made-up checkpoints with the names, shapes, dtypes and files of real ones, for tests, demos and benchmarks.

    python make_checkpoint.py --out DIR                                     # a tiny Kimi-K2.6, a few MB
    python make_checkpoint.py --out DIR --layers 5 --experts 48 --hidden 2048 --moe_intermediate 1024 --files 8
    python make_checkpoint.py --out DIR --headers_only --files 64           # all of Kimi-K2.6, as sparse files

Sizes that no flag gives are those of a tiny model or, with --headers_only or --true_sizes, of the real one. Kimi's
routed experts are int4 in the `pack-quantized` format of compressed-tensors, the projections of `deepseek-fp8` are FP8
in blocks of 128 x 128, all else is bf16, and one scale lies in another file than its weight, as it may in real
checkpoints. The same flags give the same bytes.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import ml_dtypes
import numpy as np

Config: TypeAlias = dict[str, Any]
Pools: TypeAlias = Mapping[str, memoryview]

GROUP = 32  # Weights that share a scale in Kimi-K2.6.
BLOCK = 128  # Rows, and columns, that share a scale in DeepSeek-V3.
ITEM_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F8_E4M3": 1}
# safetensors puts larger dtypes first, then sorts by name, so that every tensor is aligned.
DTYPE_ORDER = ("F32", "I32", "BF16", "F8_E4M3")

# Values come from pools of random items that all tensors share, each from its own start: far faster than fresh random
# numbers. The prime length keeps the rows of a tensor apart (their length never divides it), and the starts too.
POOL_ITEMS = 1_999_993
POOL_STRIDE = 611_953

# Configs as published, without fields that only say how to load the code.
DEEPSEEK: Config = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
  "attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
  "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 129280, "tie_word_embeddings": false, "use_cache": true,
  "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_nextn_predict_layers": 0,
  "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-06,
  "first_k_dense_replace": 3, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_routed_experts": 256,
  "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
  "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
  "max_position_embeddings": 163840, "rope_theta": 10000,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"}
}""")
DEEPSEEK_FP8: Config = DEEPSEEK | json.loads("""{
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]}
}""")
DEEPSEEK_V2_LITE: Config = DEEPSEEK | json.loads("""{
  "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
  "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
  "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null,
  "first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
  "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
  "norm_topk_prob": false, "routed_scaling_factor": 1.0,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                   "original_max_position_embeddings": 4096, "type": "yarn"}
}""")
KIMI_TEXT: Config = DEEPSEEK | json.loads(r"""{
  "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "vocab_size": 163840,
  "num_attention_heads": 64, "num_key_value_heads": 64, "rms_norm_eps": 1e-05,
  "first_k_dense_replace": 1, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
  "max_position_embeddings": 262144, "rope_theta": 50000.0,
  "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"},
  "quantization_config": {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": null,
    "ignore": ["re:.*lm_head.*", "re:.*self_attn.*", "re:.*shared_experts.*",
               "re:.*mlp\\.(gate|up|gate_up|down)_proj.*", "re:vision_tower.*", "re:mm_projector.*"],
    "config_groups": {"group_0": {"input_activations": null, "output_activations": null, "targets": ["Linear"],
      "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": 32, "num_bits": 4,
                  "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": true, "type": "int"}}}}
}""")
KIMI: Config = json.loads("""{
  "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "torch_dtype": "bfloat16",
  "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839, "media_placeholder_token_id": 163605,
  "tie_word_embeddings": false,
  "vision_config": {
    "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed", "merge_kernel_size": [2, 2], "vt_hidden_size": 1152, "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27, "mm_projector_type": "patchmerger",
    "mm_hidden_size": 1152, "projector_ln_eps": 1e-05, "text_hidden_size": 7168}
}""")
LLAMA: Config = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "attention_bias": false,
  "mlp_bias": false, "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001, "vocab_size": 128256,
  "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": false, "use_cache": true,
  "max_position_embeddings": 131072, "rope_theta": 500000.0,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"}
}""")
TEXT_CONFIGS = {
    "kimi-k2.6": KIMI_TEXT,
    "deepseek": DEEPSEEK,
    "deepseek-fp8": DEEPSEEK_FP8,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "llama": LLAMA,
}

# The sizes that flags may set, as `config.json` calls them, with those of a tiny model.
SIZES = {
    "layers": ("num_hidden_layers", 3),
    "dense_layers": ("first_k_dense_replace", 1),
    "experts": ("n_routed_experts", 8),
    "experts_per_token": ("num_experts_per_tok", 2),
    "groups": ("n_group", 1),
    "hidden": ("hidden_size", 256),
    "intermediate": ("intermediate_size", 512),
    "moe_intermediate": ("moe_intermediate_size", 128),
    "heads": ("num_attention_heads", 4),
    "kv_heads": ("num_key_value_heads", 2),
    "q_lora_rank": ("q_lora_rank", 64),
    "kv_lora_rank": ("kv_lora_rank", 32),
    "qk_nope_head_dim": ("qk_nope_head_dim", 32),
    "qk_rope_head_dim": ("qk_rope_head_dim", 16),
    "v_head_dim": ("v_head_dim", 32),
    "vocab": ("vocab_size", 512),
}
TINY_VISION = {"vt_hidden_size": 32, "vt_intermediate_size": 64, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 2}
TINY_VISION |= {"init_pos_emb_height": 8, "init_pos_emb_width": 8, "mm_hidden_size": 32}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write. `values` names the pool its items come from; "shape" means the two sizes in `logical`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: str
    logical: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def make_config(family: str, sizes: Mapping[str, int | None], true_sizes: bool) -> Config:
    """Returns the content of config.json. `sizes` maps flags (keys of `SIZES`) to values; None leaves the default."""
    text = dict(TEXT_CONFIGS[family])
    for flag, (key, tiny) in SIZES.items():
        size = sizes.get(flag)
        if text.get(key) is None:
            if size is not None:
                raise SystemExit(f"--{flag}: the family {family} has no {key}")
        elif size is not None or not true_sizes:
            text[key] = tiny if size is None else size
    if "kv_lora_rank" in text:  # Every head of multi-head latent attention has its own keys.
        text["num_key_value_heads"] = text["num_attention_heads"]
        text["topk_group"] = min(text["topk_group"], text["n_group"])
    if family != "kimi-k2.6":
        return text
    if text["hidden_size"] % GROUP or text["moe_intermediate_size"] % GROUP:
        raise SystemExit(f"--hidden and --moe_intermediate: quantized weights need multiples of {GROUP}")
    vision = KIMI["vision_config"] | {"text_hidden_size": text["hidden_size"]} | ({} if true_sizes else TINY_VISION)
    return KIMI | {"text_config": text, "vision_config": vision}


def weight(name: str, *shape: int) -> Tensor:
    """A bf16 tensor; the scales of norms lie around 1."""
    return Tensor(name, "BF16", shape, "norm" if name.endswith("norm.weight") else "weight")


def quantization(c: Config) -> str | None:
    """The method of quantization that a config announces."""
    method: str | None = c.get("quantization_config", {}).get("quant_method")
    return method


def linear(name: str, c: Config, rows: int, columns: int) -> Iterator[Tensor]:
    """A projection: FP8 and its scales in a checkpoint that is quantized so, else bf16."""
    if quantization(c) == "fp8":
        yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns), "bytes")
        yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK)), "block scale")
    else:
        yield weight(f"{name}.weight", rows, columns)


def packed(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """The three tensors of an int4 weight in the `pack-quantized` format."""
    yield Tensor(f"{name}.weight_packed", "I32", (rows, columns // 8), "codes")
    yield Tensor(f"{name}.weight_scale", "BF16", (rows, columns // GROUP), "scale")
    yield Tensor(f"{name}.weight_shape", "I32", (2,), "shape", (rows, columns))


def mlp(prefix: str, c: Config, inner: int, *, int4: bool = False) -> Iterator[Tensor]:
    """A gated MLP."""
    hidden = c["hidden_size"]
    for part, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        name = f"{prefix}.{part}_proj"
        yield from packed(name, rows, columns) if int4 else linear(name, c, rows, columns)


def grouped_attention(prefix: str, c: Config) -> Iterator[Tensor]:
    """Llama's attention."""
    hidden, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    yield weight(f"{prefix}.q_proj.weight", hidden, hidden)
    yield weight(f"{prefix}.k_proj.weight", c["num_key_value_heads"] * head, hidden)
    yield weight(f"{prefix}.v_proj.weight", c["num_key_value_heads"] * head, hidden)
    yield weight(f"{prefix}.o_proj.weight", hidden, hidden)


def latent_attention(prefix: str, c: Config) -> Iterator[Tensor]:
    """DeepSeek's multi-head latent attention."""
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    if c["q_lora_rank"] is None:
        yield from linear(f"{prefix}.q_proj", c, query, hidden)
    else:
        yield from linear(f"{prefix}.q_a_proj", c, c["q_lora_rank"], hidden)
        yield weight(f"{prefix}.q_a_layernorm.weight", c["q_lora_rank"])
        yield from linear(f"{prefix}.q_b_proj", c, query, c["q_lora_rank"])
    yield from linear(f"{prefix}.kv_a_proj_with_mqa", c, rank + c["qk_rope_head_dim"], hidden)
    yield weight(f"{prefix}.kv_a_layernorm.weight", rank)
    yield from linear(f"{prefix}.kv_b_proj", c, heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank)
    yield from linear(f"{prefix}.o_proj", c, hidden, heads * c["v_head_dim"])


def experts(prefix: str, c: Config) -> Iterator[Tensor]:
    """The router, the routed and the shared experts of one layer."""
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    yield weight(f"{prefix}.gate.weight", c["n_routed_experts"], hidden)
    if c["topk_method"] == "noaux_tc":
        yield Tensor(f"{prefix}.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],), "bias")
    for expert in range(c["n_routed_experts"]):
        yield from mlp(f"{prefix}.experts.{expert}", c, inner, int4=quantization(c) == "compressed-tensors")
    yield from mlp(f"{prefix}.shared_experts", c, inner * c["n_shared_experts"])


def text_tensors(prefix: str, c: Config) -> Iterator[Tensor]:
    """The language model."""
    hidden = c["hidden_size"]
    yield weight(f"{prefix}model.embed_tokens.weight", c["vocab_size"], hidden)
    for number in range(c["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{number}"
        yield weight(f"{layer}.input_layernorm.weight", hidden)
        yield from (latent_attention if "kv_lora_rank" in c else grouped_attention)(f"{layer}.self_attn", c)
        yield weight(f"{layer}.post_attention_layernorm.weight", hidden)
        if "n_routed_experts" in c and number >= c["first_k_dense_replace"]:
            yield from experts(f"{layer}.mlp", c)
        else:
            yield from mlp(f"{layer}.mlp", c, c["intermediate_size"])
    yield weight(f"{prefix}model.norm.weight", hidden)
    yield weight(f"{prefix}lm_head.weight", c["vocab_size"], hidden)


def vision_tensors(c: Config) -> Iterator[Tensor]:
    """Kimi's vision tower and projector, which text-only converters must leave out knowingly."""
    width, inner, merged = c["vt_hidden_size"], c["vt_intermediate_size"], 4 * c["vt_hidden_size"]
    tower, patch = "vision_tower", c["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.patch_embed.proj": (width, 3, patch, patch),
        f"{tower}.encoder.final_layernorm": (width,),
        "mm_projector.pre_norm": (width,),
        "mm_projector.proj.0": (merged, merged),
        "mm_projector.proj.2": (c["text_hidden_size"], merged),
    }
    for number in range(c["vt_num_hidden_layers"]):
        block = f"{tower}.encoder.blocks.{number}"
        shapes |= {f"{block}.norm0": (width,), f"{block}.norm1": (width,), f"{block}.wo": (width, width)}
        shapes |= {f"{block}.wqkv": (3 * width, width)}
        shapes |= {f"{block}.mlp.fc0": (inner, width), f"{block}.mlp.fc1": (width, inner)}
    yield weight(f"{tower}.patch_embed.pos_emb.weight", c["init_pos_emb_height"], c["init_pos_emb_width"], width)
    for name, shape in shapes.items():
        yield weight(f"{name}.weight", *shape)
        yield weight(f"{name}.bias", shape[0])


def all_tensors(config: Config) -> list[Tensor]:
    """Every tensor of the model that `config` describes."""
    if "text_config" not in config:
        return list(text_tensors("", config))
    return [*text_tensors("language_model.", config["text_config"]), *vision_tensors(config["vision_config"])]


def split(tensors: Sequence[Tensor], files: int) -> list[list[Tensor]]:
    """Deals the tensors out to files of about the same length; one scale goes to the last file, its codes do not."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    stray = next((tensor for tensor in tensors if tensor.values in ("scale", "block scale")), None)
    parts: list[list[Tensor]] = [[] for _ in range(files)]
    for tensor in tensors:
        parts[-1 if tensor is stray else done * files // total].append(tensor)
        done += tensor.nbytes
    if not all(parts):
        raise SystemExit(f"--files {files}: more files than the tensors can fill")
    return [sorted(part, key=lambda t: (DTYPE_ORDER.index(t.dtype), t.name)) for part in parts]


def header(tensors: Sequence[Tensor]) -> bytes:
    """The file's first bytes, as the safetensors library writes them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_pools(seed: int) -> Pools:
    """Random items of realistic size for each kind of tensor."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(POOL_ITEMS, np.float32)
    arrays = {
        "weight": (0.02 * normal).astype(ml_dtypes.bfloat16),
        "norm": (1 + 0.1 * normal).astype(ml_dtypes.bfloat16),
        "bias": 8 + 0.1 * normal,
        "scale": rng.uniform(1e-3, 1e-2, POOL_ITEMS).astype(ml_dtypes.bfloat16),
        "codes": int4_words(rng),
        "block scale": rng.uniform(1e-5, 1e-4, POOL_ITEMS).astype(np.float32),
        # FP8 codes of both signs, without those of NaN.
        "bytes": rng.integers(0, 127, POOL_ITEMS, np.uint8) | rng.choice(np.array([0, 128], np.uint8), POOL_ITEMS),
    }
    return {name: array.view(np.uint8).data for name, array in arrays.items()}


def int4_words(rng: np.random.Generator) -> np.ndarray:
    """Words of eight int4 codes as training for int4 leaves them: from -7 to 7, and in each word a 7 or a -7."""
    words = np.zeros(POOL_ITEMS, np.uint32)
    for position in range(8):
        nibbles = rng.integers(1, 16, POOL_ITEMS, np.uint32) if position else rng.choice((1, 15), POOL_ITEMS)
        words |= nibbles.astype(np.uint32) << np.uint32(4 * position)
    return words


def write_values(file: BinaryIO, tensor: Tensor, number: int, pools: Pools) -> None:
    """Writes the data of the model's `number`-th tensor."""
    if tensor.values == "shape":
        file.write(np.array(tensor.logical, "<i4").tobytes())
        return
    pool, left = pools[tensor.values], tensor.nbytes
    start = number * POOL_STRIDE % POOL_ITEMS * ITEM_BYTES[tensor.dtype]
    while left:
        left -= file.write(pool[start : start + left])
        start = 0


def write_checkpoint(
    out: str,
    *,
    family: str = "kimi-k2.6",
    files: int = 3,
    seed: int = 0,
    headers_only: bool = False,
    true_sizes: bool = False,
    **sizes: int | None,
) -> None:
    """Writes a checkpoint into the empty or new directory `out`; `sizes` are the flags of `SIZES`."""
    os.makedirs(out, exist_ok=True)
    if os.listdir(out):
        raise SystemExit(f"{out}: not empty; old files would become part of the checkpoint")
    config = make_config(family, sizes, true_sizes or headers_only)
    tensors = all_tensors(config)
    number = {tensor.name: i for i, tensor in enumerate(tensors)}
    pools = {} if headers_only else make_pools(seed)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(split(tensors, files), 1):
        name = f"model-{i:05d}-of-{files:06d}.safetensors"
        weight_map |= {tensor.name: name for tensor in part}
        with open(os.path.join(out, name), "wb") as file:
            file.write(header(part))
            if headers_only:
                file.truncate(file.tell() + sum(tensor.nbytes for tensor in part))
                continue
            for tensor in part:
                write_values(file, tensor, number[tensor.name], pools)
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
        with open(os.path.join(out, name), "w", encoding="utf-8") as text:
            json.dump(content, text, indent=2)


def main(arguments: Sequence[str]) -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="an empty or new directory")
    parser.add_argument("--family", choices=sorted(TEXT_CONFIGS), default="kimi-k2.6")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headers_only", action="store_true", help="headers over sparse files; implies --true_sizes")
    parser.add_argument("--true_sizes", action="store_true", help="sizes without a flag are the real model's")
    for flag, (key, tiny) in SIZES.items():
        parser.add_argument(f"--{flag}", type=int, help=f"{key} (tiny: {tiny})")
    write_checkpoint(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
