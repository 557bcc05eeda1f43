"""Writes the tiny Hugging Face checkpoints of the MaxText oracle, and transformers' logits for each.

    python make_sources.py OUT_DIR

For each case of `cases.py` this writes `OUT_DIR/<case>/hf` (the checkpoint, in several files, written by transformers'
`save_pretrained`, or quantized by `quantize.py`) and `OUT_DIR/<case>/expected.npz` (the token ids, their positions, and
the logits in float32). Runs in the test environment, which has torch.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import CASES, TOKENS, Case
from quantize import QUANTIZE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# The plain implementations: the definition of the model, and the ones that take any size.
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# A few tensors of the wrapper around the text model of Kimi-K2.5 and Kimi-K2.6, by their published names.
_VISION_TENSORS = {
    "mm_projector.pre_norm.weight": (24,),
    "mm_projector.proj.0.weight": (96, 96),
    "vision_tower.encoder.blocks.0.wqkv.weight": (72, 24),
    "vision_tower.patch_embed.pos_emb.weight": (4, 4, 24),
}


def build(case: Case) -> nn.Module:
    """Returns the case's model in float32, with random weights of its source dtype's precision.

    Norms are not one, biases are not zero, and no two tensors are alike, so a tensor that is missed,
    exchanged, or left at its initial value shows in the logits.
    """
    config = transformers.AutoConfig.for_model(case.architecture, **case.config)
    model = transformers.AutoModelForCausalLM.from_config(config, **_EAGER)
    model = model.float().eval()
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "bias" in name:
                values = 0.5 * noise
            elif parameter.ndim == 1:
                values = 1 + 0.3 * noise
            elif "embed_tokens" in name:
                values = noise
            else:
                inputs = parameter.shape[-2 if case.architecture == "gpt_oss" and "experts" in name else -1]
                values = noise * inputs**-0.5  # activations and logits stay near one
            parameter.copy_(values.to(getattr(torch, case.dtype)))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Wide enough to change which experts are chosen; float32 in all published checkpoints.
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=random))
    return model


def logits(model: nn.Module, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the model's logits, `[batch, tokens, vocab]` in float32."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            # With an explicit mask transformers does not take the gaps between positions for borders of documents.
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            use_cache=False,
        )
    return np.asarray(output.logits.float())


def tensors_on_disk(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the model's tensors by the names of published checkpoints, parameters in `dtype`, buffers as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="1GB")
        return load_file(Path(folder) / "model.safetensors")


def write_plain(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Writes an unquantized checkpoint in several files, all by transformers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size="64KB")
    if not (folder / "model.safetensors.index.json").exists():
        raise RuntimeError(f"{folder} was written as one file; lower max_shard_size so that the index is tested too")


def write_quantized(model: nn.Module, case: Case, folder: Path) -> nn.Module:
    """Writes a quantized checkpoint, the scales in other files than the weights they belong to.

    Returns:
      The model that the checkpoint stands for, in float32.
    """
    quantized = QUANTIZE[case.quantization](tensors_on_disk(model, getattr(torch, case.dtype)))
    stored = quantized.stored
    if case.multimodal:
        stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        stored |= {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in _VISION_TENSORS.items()}

    names = sorted(stored)
    files = {name: 1 + 3 * index // len(names) for index, name in enumerate(names)}
    for name in names:
        if name.endswith(("_scale", "_scale_inv", "_scales")):
            files[name] = files[name] % 3 + 1
    file_name = "model-{:05d}-of-00003.safetensors".format
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        part = {name: stored[name].contiguous() for name in names if files[name] == number}
        save_file(part, folder / file_name(number), metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
        "weight_map": {name: file_name(files[name]) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_published_config(model, case, quantized.config), indent=2))

    with tempfile.TemporaryDirectory() as unquantized:
        model.config.save_pretrained(unquantized)
        save_file(
            {name: tensor.contiguous() for name, tensor in quantized.dequantized.items()},
            Path(unquantized) / "model.safetensors",
            metadata={"format": "pt"},
        )
        return type(model).from_pretrained(unquantized, dtype=torch.float32, **_EAGER).eval()


def _published_config(model: nn.Module, case: Case, quantization: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json as published: RoPE in the keys of transformers 4, Kimi by the names of its remote code."""
    text: dict[str, Any] = json.loads(model.config.to_json_string())
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    text["architectures"] = [type(model).__name__]
    if case.model_name.startswith("kimi"):
        text["model_type"] = "kimi_k2"
    if not case.multimodal:
        return text | {"quantization_config": quantization}
    ignore = [*quantization["ignore"][1:], "re:.*lm_head.*", "re:vision_tower.*", "re:mm_projector.*"]
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text | {"quantization_config": quantization | {"ignore": ignore}},
        "tie_word_embeddings": False,
        "vision_config": {"hidden_size": 24, "num_hidden_layers": 1},
    }


def make_source(case: Case, folder: Path) -> None:
    """Writes the checkpoint and the expected logits of one case."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    ids = random.integers(0, case.config["vocab_size"], (1, TOKENS))
    # Only distances matter to RoPE: gaps make them long enough for the scaled, slow frequencies to show.
    positions = np.cumsum(random.integers(1, 12, (1, TOKENS)), axis=-1)
    model = build(case)
    if case.quantization:
        model = write_quantized(model, case, folder / "hf")
        values = logits(model, ids, positions)
    else:
        values = logits(model, ids, positions)
        write_plain(model, getattr(torch, case.dtype), folder / "hf")
    np.savez(folder / "expected.npz", ids=ids, positions=positions, logits=values)
    print(f"{case.name}: logits of scale {values.std():.2f}")


def main(arguments: list[str]) -> None:
    """Writes all cases, or those named after the folder, in the folder given first."""
    if not arguments:
        sys.exit("usage: make_sources.py OUT_DIR [CASE ...]")
    out, names = Path(arguments[0]), arguments[1:]
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if not names or case.name in names:
            make_source(case, out / case.name)


if __name__ == "__main__":
    main(sys.argv[1:])
