"""What a checkpoint announces about its quantization.

The announcement only supplies what stored shapes and dtypes cannot; whether a tensor is quantized is decided by what is
stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The announced format, as far as it matters for decoding.

    Attributes:
        description: What the plan calls it, for example `compressed-tensors pack-quantized`.
        group_size: The announced group size, or None where there is none or several.
        refusal: If the format is one that no codec covers: its description for the error message.
    """

    description: str
    group_size: int | None
    refusal: str | None


def read(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """The announcement in a `config.json`, from wherever publishers put it; None if the checkpoint is not quantized."""
    text = config.get("text_config")
    candidates = [config.get("quantization_config"), config.get("compression_config")]
    if isinstance(text, Mapping):
        candidates += [text.get("quantization_config"), text.get("compression_config")]
    found = next((candidate for candidate in candidates if isinstance(candidate, Mapping)), None)
    if found is None:
        return None
    # Old compressed-tensors releases spell the method with an underscore, and some leave it out.
    method = str(found.get("quant_method", "compressed-tensors")).lower().replace("_", "-")
    if method != "compressed-tensors":
        return QuantizationConfig(method, None, refusal=f"'{method}'")
    layout = str(found.get("format"))
    description = f"{method} {layout}"
    groups = found.get("config_groups")
    schemes = [_weights(group) for group in groups.values()] if isinstance(groups, Mapping) else []
    if layout != "pack-quantized" or not schemes:
        return QuantizationConfig(description, None, refusal=f"'{description}'")
    for scheme in schemes:
        values = (
            scheme.get("num_bits"),
            scheme.get("type", "int"),
            scheme.get("symmetric", True),
            scheme.get("actorder"),
        )
        if values != (4, "int", True, None):
            bits, kind, symmetric, order = values
            detail = f"{bits}-bit {kind}, {'symmetric' if symmetric else 'asymmetric'}, actorder {order}"
            return QuantizationConfig(description, None, refusal=f"'{description}' ({detail})")
    sizes = {scheme.get("group_size") for scheme in schemes if scheme.get("strategy") == "group"}
    return QuantizationConfig(description, sizes.pop() if len(sizes) == 1 else None, refusal=None)


def _weights(group: Any) -> Mapping[str, Any]:
    """What a group says about weights; nothing, which no codec covers, where it makes no sense."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}
