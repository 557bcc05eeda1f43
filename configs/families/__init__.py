"""One module per model family: the rules that map Hugging Face tensors to MaxText leaves.

To add a family, add a module with `ARCHITECTURES` and `model(config, architecture, options)`, and a line in `FAMILIES`;
docs/adding-a-family.md shows one. What families have in common is in `blocks.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from slicecast.configs.families import (
    deepseek,
    deepseek_v4,
    gemma,
    gemma4,
    gpt_oss,
    llama,
    llama4,
    mixtral,
    olmo,
    qwen,
    qwen_hybrid,
)
from slicecast.convert.errors import ConfigError, UnsupportedArchitectureError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Model, ModelOptions
from slicecast.convert.source.safetensors_header import clip, is_name


@dataclass(frozen=True)
class Family:
    """A family, for the list of families.

    Attributes:
        title: Its models, as people call them.
        rules: The module with its rules: `ARCHITECTURES`, and `model(config, architecture, options)`.
        models: How MaxText's names of its models begin.
        compared: What was compared with other programs on tiny models: `logits` with those of transformers, in both
            layouts where there are two; `bits` with what MaxText's converter writes, in the layouts that it can
            write. Every model's tree is compared with MaxText's.
    """

    title: str
    rules: ModuleType
    models: tuple[str, ...]
    compared: tuple[str, ...]


_BOTH = ("logits", "bits")

FAMILIES = (
    Family("DeepSeek V2, V3, R1, V3.1, V3.2; Kimi K2", deepseek, ("deepseek2-", "deepseek3", "kimi-"), _BOTH),
    Family("DeepSeek V4", deepseek_v4, ("deepseek4-",), _BOTH),
    Family("Gemma 1, 2, 3", gemma, ("gemma-", "gemma2-", "gemma3-"), _BOTH),
    Family("Gemma 4", gemma4, ("gemma4-",), _BOTH),
    Family("gpt-oss", gpt_oss, ("gpt-oss-",), _BOTH),
    Family("Llama 2, 3, 3.1, 3.2, 3.3; Mistral", llama, ("llama2-", "llama3", "mistral-"), _BOTH),
    Family("Llama 4", llama4, ("llama4-",), ("logits",)),
    Family("Mixtral", mixtral, ("mixtral-",), _BOTH),
    Family("OLMo 3", olmo, ("olmo3-",), _BOTH),
    Family("Qwen 2.5, 3, 3-MoE, 3-VL, 3-Omni; Weaver", qwen, ("qwen2.5-", "qwen3-", "weaver-"), _BOTH),
    Family("Qwen 3-Next, 3.5", qwen_hybrid, ("qwen3-next-", "qwen3.5-"), _BOTH),
)


# What a config without `architectures` is, by its `model_type`.
_BY_MODEL_TYPE = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gpt_oss": "GptOssForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def supported_architectures() -> list[str]:
    """Every value of `architectures` in `config.json` that some family covers."""
    return sorted(name for family in FAMILIES for name in family.rules.ARCHITECTURES)


def recognize(config: Mapping[str, Any], options: ModelOptions = ModelOptions()) -> Model:  # noqa: B008  It is frozen.
    """The model that a `config.json` describes.

    Args:
        config: The parsed `config.json`.
        options: What the user says about the model.

    Raises:
        UnsupportedArchitectureError: If no family covers the architecture.
        ConfigError: If a field is missing or has a value that the family's rules do not cover.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: field 'architectures' is {clip(architectures)}; a list of names is expected.")
    model_type = config.get("model_type")
    if not architectures and isinstance(model_type, str):
        architectures = [_BY_MODEL_TYPE.get(model_type, f"of model_type '{model_type}'")]
    for family in FAMILIES:
        for architecture in architectures:
            if architecture in family.rules.ARCHITECTURES:
                model: Model = family.rules.model(HfConfig(config), architecture, options)
                _check_parts(model, options)
                return model
    given = ", ".join(map(str, architectures)) or "(none given)"
    raise UnsupportedArchitectureError(
        f"config.json: architecture {given if is_name(given) else clip(given)} is not supported. "
        f"Supported: {', '.join(supported_architectures())}."
    )


def _check_parts(model: Model, options: ModelOptions) -> None:
    """Refuses to leave out without a word what the user asked for."""
    for asked, name, part, what in (
        (options.use_multimodal, "use_multimodal", "vision_encoder/", "vision encoder"),
        (options.enable_mtp, "enable_mtp", "mtp_block/", "layer for multi-token prediction"),
    ):
        if asked and not any(rule.target.startswith(part) for rule in model.rules):
            raise ConfigError(f"--{name}: {model.description} has no {what} that MaxText has too. Leave the flag out.")
