"""Tiny models, and their quantized checkpoints as the libraries write them.

A writer puts the checkpoint into a directory and returns, by name, the weights that the same library makes of it.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import is_module_quantized
from formats import Format, random_weight, write_checkpoint
from modelopt.torch.export import export_hf_checkpoint
from oracle_bitsandbytes import dequantize as dequantize_4bit
from oracle_compressed_tensors import parameters
from oracle_modelopt import dequantize as dequantize_modelopt
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

Weights = dict[str, Tensor]
Write = Callable[[PreTrainedModel, Path, torch.Generator], Weights]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def build(model_type: str, config: Mapping[str, Any], random: torch.Generator) -> PreTrainedModel:
    """A model in bfloat16 with random weights, no two of them alike."""
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in made.parameters():
            values = (
                random_weight(tuple(parameter.shape), random)
                if parameter.ndim > 1
                else torch.randn(parameter.shape, generator=random)
            )
            parameter.copy_(values)
        for name, buffer in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=random))
    return made.bfloat16()


def tensors_on_disk(model: PreTrainedModel) -> tuple[Weights, dict[str, Any]]:
    """What transformers writes for a model: its tensors by the names of published checkpoints, and `config.json`."""
    dtype = model.config.dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config.dtype = dtype  # Of which saving has left the name only; ModelOpt needs the dtype.
        return load_file(Path(folder) / "model.safetensors"), json.loads((Path(folder) / "config.json").read_text())


def linear_weights(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a layer that formats quantize: not an embedding, a norm, or a router."""
    kept = ("embed_tokens", "lm_head", ".mlp.gate.", ".mlp.router.")
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in kept)


def every_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix: MLX quantizes embeddings too."""
    return name.endswith(".weight") and tensor.ndim == 2


def experts(name: str, tensor: Tensor) -> bool:
    """Whether a tensor belongs to the routed experts."""
    return ".mlp.experts." in name and tensor.ndim > 1 and not name.endswith("bias")


def tensor_by_tensor(form: Format, chosen: Callable[[str, Tensor], bool] = linear_weights) -> Write:
    """The chosen weights by the library's functions, for libraries that write whole checkpoints on a GPU only."""

    def write(model: PreTrainedModel, directory: Path, random: torch.Generator) -> Weights:
        plain, config = tensors_on_disk(model)
        stored, weights = {}, {}
        for name, tensor in plain.items():
            stored[name] = weights[name] = tensor
            if chosen(name, tensor):
                quantized = form.quantize(tensor.float(), random)
                weights[name] = quantized.weight
                del stored[name]
                module = name.rpartition(".")[0]
                # What `Format` calls the parameter, this model may call by another name: two expert tensors, say.
                parameter = name.rpartition(".")[2]
                stored |= {
                    f"{module}.{part.replace(form.parameter, parameter, 1)}": value
                    for part, value in quantized.tensors.items()
                }
        write_checkpoint(directory, stored, config | form.config)
        return weights

    return write


def compressed_tensors(preset: str) -> Write:
    """The whole model by compressed-tensors, as llm-compressor saves it."""

    def write(model: PreTrainedModel, directory: Path, random: torch.Generator) -> Weights:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
        for module in filter(is_module_quantized, model.modules()):
            own = dict(module.named_parameters())
            for name, parameter in own.items():
                if name.startswith("input_"):  # Nothing was calibrated.
                    parameter.data.fill_(1)
            for name, value in parameters(module.weight.detach().float(), scheme.weights, torch.float32).items():
                own[name].data.copy_(value)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(str(directory))

        # With float32 scales the products are exact. NVFP4 and MX formats are decoded to bfloat16.
        saved = load_file(directory / "model.safetensors")
        wide = {
            name: tensor.float() if name.endswith("weight_scale") and tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in saved.items()
        }
        dtype = torch.bfloat16 if preset.startswith(("NV", "MX")) else torch.float32
        dequantizer = CompressedTensorsDequantizer(str(directory), ["re:.*embed_tokens", "re:.*norm"], dtype)
        weights = dequantizer.process(wide)
        return {name: tensor for name, tensor in weights.items() if not name.endswith("scale")}

    return write


def modelopt(recipe: str) -> Write:
    """The whole model by ModelOpt."""

    def write(model: PreTrainedModel, directory: Path, random: torch.Generator) -> Weights:
        ids = torch.randint(0, model.config.vocab_size, (1, 16), generator=random)
        quantized: nn.Module = mtq.quantize(model, getattr(mtq, recipe), lambda calibrated: calibrated(ids))
        export_hf_checkpoint(quantized, export_dir=directory)
        saved = load_file(directory / "model.safetensors")
        return {
            name: dequantize_modelopt(tensor, saved[f"{name}_scale"], saved.get(f"{name}_scale_2"))
            if f"{name}_scale" in saved
            else tensor
            for name, tensor in saved.items()
            if not name.endswith(("_scale", "_scale_2"))
        }

    return write


def bitsandbytes(kind: str, nested: bool) -> Write:
    """The whole model by transformers with bitsandbytes."""

    def write(model: PreTrainedModel, directory: Path, random: torch.Generator) -> Weights:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
        )
        with tempfile.TemporaryDirectory() as plain:
            model.save_pretrained(plain)
            quantized = type(model).from_pretrained(
                plain, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
            )
        quantized.save_pretrained(directory)
        saved = load_file(directory / "model.safetensors")
        weights = {}
        for name in (name for name in saved if name.endswith("weight")):
            module = name.removesuffix("weight")
            parts = {key.removeprefix(module): part for key, part in saved.items() if key.startswith(name)}
            weights[name] = dequantize_4bit(parts) if len(parts) > 1 else saved[name]
        return weights

    return write
