"""One module per model family: the rules that map Hugging Face tensors to MaxText leaves.

To add a family, add a module with `ARCHITECTURES` and `model(config, architecture, options)`, and name it in
`FAMILIES`; docs/adding-a-family.md shows one. What families have in common is in `blocks.py`.
"""

from collections.abc import Mapping
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

FAMILIES: tuple[ModuleType, ...] = (
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


def supported_architectures() -> list[str]:
    """Every value of `architectures` in `config.json` that some family covers."""
    return sorted(name for family in FAMILIES for name in family.ARCHITECTURES)


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
        raise ConfigError(f"config.json: field 'architectures' is {architectures!r}; a list of names is expected.")
    for family in FAMILIES:
        for architecture in architectures:
            if architecture in family.ARCHITECTURES:
                model: Model = family.model(HfConfig(config), architecture, options)
                return model
    raise UnsupportedArchitectureError(
        f"config.json: architecture {', '.join(map(str, architectures)) or '(none given)'} is not supported. "
        f"Supported: {', '.join(supported_architectures())}."
    )
