"""Gemma 4: how configs say what is special about global layers."""

from typing import Any

import published_models
import pytest

from slicecast.configs import families


def as_transformers_5_writes_it(text: dict[str, Any]) -> dict[str, Any]:
    """The same config with what is special about each global layer under its number."""
    special = {"head_dim": text["global_head_dim"]}
    if text["attention_k_eq_v"]:
        special["num_key_value_heads"] = text["num_global_key_value_heads"]
    layers = [number for number, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    kept = {field: value for field, value in text.items() if "global" not in field}
    return kept | {"per_layer_config": {f"{number:02}": special for number in layers}}


@pytest.mark.parametrize("name", ["gemma4-26b", "gemma4-31b", "gemma4-e2b", "gemma4-e4b"])
def test_global_layers_are_described_in_two_ways(name: str) -> None:
    published = published_models.load(name).config
    written = published | {"text_config": as_transformers_5_writes_it(published["text_config"])}
    assert written["text_config"] != published["text_config"]
    assert families.recognize(written).rules == families.recognize(published).rules
