"""Writes the tiny Hugging Face checkpoints of the MaxText oracle, and transformers' logits for each.

    python make_sources.py OUT_DIR

For each case of `cases.py` this writes `OUT_DIR/<case>/hf` (the checkpoint, in several files, in the form in which such
models are published; `quantize.py` quantizes) and `OUT_DIR/<case>/expected.npz` (the token ids, their positions, and
the logits in float32). Runs in the test environment, which has torch.
"""

import dataclasses
import json
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from case import Case
from cases import CASES
from models import deepseek_v4, qwen
from prediction_layer import PredictionLayer
from quantize import QUANTIZE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# The plain implementations: the definition of the model, and the ones that take any size.
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Their norms multiply by one more than the stored weight.
_NORMS_LESS_ONE = ("gemma", "gemma2", "gemma3", "qwen3_next", "qwen3_5_moe")

# They have norms of the outputs of attention and MLP, too.
_OUTPUT_NORMS = ("gemma2", "gemma3", "gemma4", "olmo3")

# Their experts' weights are stored with the inputs before the outputs.
_INPUTS_FIRST = ("gpt_oss", "llama4")

# Weights of Gemma 4 that transformers does not call parameters: of its layers, and of what its vision tower returns.
_SAVED_BUFFERS = ("layer_scalar", "std_bias", "std_scale")

# Parameters that are around zero beside the biases: of the hyper-connections and the attention of DeepSeek-V4.
_AROUND_ZERO = ("base", "hc_base", "sinks")

# A few tensors of the wrapper around the text model of Kimi-K2.5 and Kimi-K2.6, by their published names.
_VISION_TENSORS = {
    "mm_projector.pre_norm.weight": (24,),
    "mm_projector.proj.0.weight": (96, 96),
    "vision_tower.encoder.blocks.0.wqkv.weight": (72, 24),
    "vision_tower.patch_embed.pos_emb.weight": (4, 4, 24),
}


def _gain(case: Case, name: str, norm: Tensor) -> float:
    """Returns the mean of what a norm multiplies by."""
    if case.architecture == "gemma4" and name.endswith("q_norm.weight"):
        return float(norm.shape[0] ** -0.5)  # nothing else scales the queries
    if case.architecture in _OUTPUT_NORMS and ".post_" in name:
        return 0.4  # errors of rounding would grow from layer to layer if outputs were as large as what they add to
    return 1.0


def _initial(case: Case) -> nn.Module:
    """Returns transformers' model of a case, as transformers initializes it."""
    if case.wrapper is None:
        config = transformers.AutoConfig.for_model(case.architecture, **case.config)
        return transformers.AutoModelForCausalLM.from_config(config, **_EAGER)
    arguments = {"text_config": dict(case.config), **case.wrapper}
    if case.architecture == "qwen3_omni_moe":
        thinker = {"thinker_config": arguments, "enable_audio_output": False}
        config = transformers.AutoConfig.for_model(case.architecture, **thinker)
        return transformers.Qwen3OmniMoeForConditionalGeneration._from_config(config, **_EAGER)
    config = transformers.AutoConfig.for_model(case.architecture, **arguments)
    return transformers.AutoModelForImageTextToText.from_config(config, **_EAGER)


def build(case: Case) -> nn.Module:
    """Returns the case's model in float32, with random weights of its source dtype's precision.

    Norms are not one, biases are not zero, and no two tensors are alike, so a tensor that is missed,
    exchanged, or left at its initial value shows in the logits.
    """
    model = _initial(case).float().eval()
    random = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    dtype = getattr(torch, case.dtype)
    norm_offset = int(case.architecture in _NORMS_LESS_ONE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "bias" in name or name.rpartition(".")[2] in _AROUND_ZERO:
                values = 0.5 * noise
            elif parameter.ndim == 1:
                values = _gain(case, name, parameter) * (1 + 0.3 * noise) - norm_offset
            elif name.endswith("embed_tokens.weight") and not case.config["tie_word_embeddings"]:
                values = noise
            elif name.endswith("router.proj.weight"):
                values = noise  # Gemma 4 divides the inputs of its router by the root of their number
            else:
                inputs = parameter.shape[-2 if case.architecture in _INPUTS_FIRST and ".experts." in name else -1]
                values = noise * inputs**-0.5  # activations and logits stay near one
            parameter.copy_(values.to(dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Wide enough to change which experts are chosen; float32 in all published checkpoints.
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=random))
            elif name.endswith(_SAVED_BUFFERS):
                buffer.copy_((1 + 0.3 * torch.randn(buffer.shape, generator=random)).to(dtype))
            elif name.endswith("embed_scale") and case.architecture == "gemma3":
                # As in the bfloat16 model that is published, and that MaxText's converter takes for its own.
                buffer.copy_(buffer.bfloat16())
            elif name.endswith("tid2eid"):
                # Each token's experts, which are different ones.
                experts = torch.rand(len(buffer), case.config["n_routed_experts"], generator=random).argsort()
                buffer.copy_(experts[:, : buffer.shape[1]])
    return model


def round_head(model: nn.Module) -> None:
    """Gives a model with tied embeddings the head that MaxText computes with.

    MaxText rounds the table to bfloat16 before it multiplies with it, in a float32 model too
    (`attend_on_embedding` in its layers/embeddings.py). Gemma's table is scaled there.
    """
    config = model.config.get_text_config()
    if config.tie_word_embeddings:
        embedding = model.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        # MaxText divides the logits again, and by the root itself where transformers multiplies with a rounded one.
        divisor = config.hidden_size**0.5 if config.model_type.startswith("gemma") else 1.0
        model.get_output_embeddings().weight = nn.Parameter((embedding.weight * scale).bfloat16().float() / divisor)


def logits(model: nn.Module, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the model's logits, `[batch, tokens, vocab]` in float32."""
    # The part of Qwen 3-Omni that reads and writes text.
    model = getattr(model, "thinker", model)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            # With an explicit mask transformers does not take the gaps between positions for borders of documents.
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            use_cache=False,
        )
    return np.asarray(output.logits.float())


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights, which are parameters but for some of Gemma 4's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(_SAVED_BUFFERS):
            buffer.data = buffer.data.to(dtype)


def tensors_on_disk(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the model's tensors by the names of published checkpoints."""
    _cast(model, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="1GB")
        return load_file(Path(folder) / "model.safetensors")


def write_plain(model: nn.Module, case: Case, folder: Path) -> None:
    """Writes an unquantized checkpoint in several files, in the form in which such models are published."""
    _cast(model, getattr(torch, case.dtype))
    tensors = model.state_dict()
    if case.architecture == "deepseek_v4":
        config = {"architectures": [type(model).__name__], "model_type": case.architecture, **case.config}
        write_files(deepseek_v4.published(tensors), config, folder)
        return
    if case.architecture == "qwen3_vl_moe":
        tensors = qwen.inputs_first(tensors)
    # Qwen 3.5 is published with the experts of a layer together; transformers' "original format" has each by itself.
    original = case.architecture != "qwen3_5_moe"
    model.save_pretrained(folder, state_dict=tensors, max_shard_size="64KB", save_original_format=original)
    if not (folder / "model.safetensors.index.json").exists():
        raise RuntimeError(f"{folder} was written as one file; lower max_shard_size so that the index is tested too")


def write_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint in three files, the scales of quantized weights in other ones than the weights."""
    names = sorted(tensors)
    files = {name: 1 + 3 * index // len(names) for index, name in enumerate(names)}
    for name in names:
        if name.endswith(("_scale", "_scale_inv", "_scales")):
            files[name] = files[name] % 3 + 1
    file_name = "model-{:05d}-of-00003.safetensors".format
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        part = {name: tensors[name].contiguous() for name in names if files[name] == number}
        save_file(part, folder / file_name(number), metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file_name(files[name]) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


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
    write_files(stored, _published_config(model, case, quantized.config), folder)

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


def write_with_prediction_layer(case: Case, ids: np.ndarray, positions: np.ndarray, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint with a layer for multi-token prediction.

    Returns:
      The logits, and the loss of that layer's predictions.
    """
    layers, dtype = case.config["num_hidden_layers"], getattr(torch, case.dtype)
    # A part of it is a decoder layer like the others: transformers makes one more of them.
    model = build(dataclasses.replace(case, config=case.config | {"num_hidden_layers": layers + 1}))
    random = torch.Generator().manual_seed(zlib.crc32(b"prediction layer"))
    prediction = PredictionLayer(model.config.hidden_size, model.config.rms_norm_eps, random, dtype)
    tensors = tensors_on_disk(model, dtype)
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    extra = {name: tensor.to(dtype) for name, tensor in prediction.state_dict().items()}
    extra |= {name: tensors[of].clone() for name, of in copies.items()}
    tensors |= {f"model.layers.{layers}.{name}": tensor for name, tensor in extra.items()}

    model.float()
    decoder_layer = model.model.layers.pop(layers)
    model.config.num_hidden_layers = layers
    write_files(tensors, json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}, folder)
    loss = prediction.loss(model, decoder_layer, torch.from_numpy(ids), lambda: logits(model, ids, positions))
    return {"logits": logits(model, ids, positions), "mtp_loss": loss}


def make_source(case: Case, folder: Path) -> None:
    """Writes the checkpoint and the expected logits of one case."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    ids = random.integers(0, case.tokens, (1, case.length))
    # Only distances matter to RoPE: gaps make them long enough for the scaled, slow frequencies to show. There can be
    # none in DeepSeek-V4, which joins tokens that follow one another.
    longest = 1 if case.architecture == "deepseek_v4" else 11
    gaps = random.integers(1, longest, (1, case.length), endpoint=True)
    positions = np.cumsum(gaps, axis=-1) - gaps[:, :1]
    if case.predicts_more:
        expected = write_with_prediction_layer(case, ids, positions, folder / "hf")
    else:
        model = build(case)
        if case.quantization:
            model = write_quantized(model, case, folder / "hf")
        else:
            write_plain(model, case, folder / "hf")
            round_head(model.float())
        expected = {"logits": logits(model, ids, positions)}
    np.savez(folder / "expected.npz", ids=ids, positions=positions, **expected)
    print(f"{case.name}: logits of scale {expected['logits'].std():.2f}")


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
