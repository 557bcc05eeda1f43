"""One module per model family: the rules that map Hugging Face tensors to MaxText leaves.

To add a family, add a module with `ARCHITECTURES` and `model(config, architecture, model_name, rope_type)`, and name it
in `_FAMILIES`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from slicecast.configs.families import deepseek, gpt_oss, llama
from slicecast.convert.errors import ConfigError, UnsupportedArchitectureError
from slicecast.convert.mapping.hf_config import HfConfig
from slicecast.convert.mapping.rules import Model

_FAMILIES: tuple[ModuleType, ...] = (deepseek, gpt_oss, llama)


def supported_architectures() -> list[str]:
    """Every value of `architectures` in `config.json` that some family covers."""
    return sorted(name for family in _FAMILIES for name in family.ARCHITECTURES)


def recognize(config: Mapping[str, Any], model_name: str | None = None, rope_type: str | None = None) -> Model:
    """The model that a `config.json` describes.

    Args:
        config: The parsed `config.json`.
        model_name: MaxText's name of the model, if the user gave one.
        rope_type: MaxText's rotary embedding that the model will run with, if the user gave one.

    Raises:
        UnsupportedArchitectureError: If no family covers the architecture.
        ConfigError: If a field is missing or has a value that the family's rules do not cover.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: field 'architectures' is {architectures!r}; a list of names is expected.")
    for family in _FAMILIES:
        for architecture in architectures:
            if architecture in family.ARCHITECTURES:
                model: Model = family.model(HfConfig(config), architecture, model_name, rope_type)
                return model
    raise UnsupportedArchitectureError(
        f"config.json: architecture {', '.join(map(str, architectures)) or '(none given)'} is not supported. "
        f"Supported: {', '.join(supported_architectures())}."
    )
