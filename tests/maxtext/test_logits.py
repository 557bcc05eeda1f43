"""A converted checkpoint loads in MaxText, and computes what transformers computes from the source.

Run by scripts/test_maxtext.sh, which writes the sources and converts them.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from cases import CASES, Case

pytestmark = pytest.mark.maxtext

# A right conversion differs by the rounding of float32, at most 6e-6 here; every mistake tried below by 0.3 or more.
TOLERANCE = 1e-5
VISIBLE = 1e-2

_BIASES = ("gate/bias", "query/bias", "key/bias", "value/bias", "out/bias", "wi_0_bias", "wi_1_bias", "wo_bias")

# The router's bias of DeepSeek and Kimi, which is no ordinary parameter: always float32, and its layers come first.
_FLOAT32_BIAS = "MoeBlock_0/gate/bias"

Change = Callable[[np.ndarray], np.ndarray]


class Converted:
    """A converted checkpoint, what MaxText makes of it, and what transformers computed from its source."""

    def __init__(self, case: Case, scan_layers: bool, sources: Path) -> None:
        self.case = case
        self.scan_layers = scan_layers
        self.items = sources / case.name / ("scanned" if scan_layers else "unscanned") / "0" / "items"
        if not self.items.is_dir():
            raise FileNotFoundError(f"{self.items} is missing: run scripts/test_maxtext.sh, which converts the sources")
        self.config: Any = oracle.config(case, scan_layers, self.items)
        self.disk = oracle.read_disk(self.items)
        with np.load(sources / case.name / "expected.npz") as expected:
            self.ids, self.positions, self.expected = (expected[key] for key in ("ids", "positions", "logits"))

    @functools.cached_property
    def model(self) -> oracle.Model:
        """MaxText's model, loaded when first needed: the test of the tree tells more about a missing leaf."""
        return oracle.Model(self.config)

    def error(self, changes: Mapping[str, np.ndarray] | None = None) -> float:
        """Returns the largest difference of MaxText's logits from transformers'."""
        logits = self.model.logits(self.ids, self.positions, changes or {})
        assert logits.shape == self.expected.shape
        return float(np.abs(logits - self.expected).max())

    def changed(self, suffix: str, change: Change) -> dict[str, np.ndarray]:
        """Returns the leaves whose path ends in `suffix`, changed in each of their layers."""
        paths = [path for path in self.model.weights if path.endswith(suffix)]
        assert paths, f"no leaf ends in {suffix}"
        return {path: self._by_layer(path, change) for path in paths}

    def _by_layer(self, path: str, change: Change) -> np.ndarray:
        """Applies a change to each layer of a leaf."""
        leaf = self.model.weights[path]
        if not self.scan_layers or "layers" not in path:
            return change(leaf)
        axis = 0 if path.endswith(_FLOAT32_BIAS) else 1
        layers = [change(np.take(leaf, layer, axis)) for layer in range(leaf.shape[axis])]
        return np.stack(layers, axis)


@pytest.fixture(
    scope="module",
    params=[(case, scan_layers) for case in CASES for scan_layers in (True, False)],
    ids=lambda parameter: f"{parameter[0].name}-{'scanned' if parameter[1] else 'unscanned'}",
)
def converted(request: pytest.FixtureRequest, sources: Path) -> Converted:
    """Each converted checkpoint, loaded once for all tests of it."""
    return Converted(*request.param, sources)


def test_tree_is_maxtexts_own(converted: Converted) -> None:
    expected = oracle.abstract_shapes(converted.config)
    assert {path: array.shape for path, array in converted.disk.items()} == expected


def test_dtype_is_the_one_asked_for(converted: Converted) -> None:
    for path, array in converted.disk.items():
        # In bfloat16 the router's bias could choose other experts.
        assert array.dtype.name == ("float32" if path.endswith(_FLOAT32_BIAS) else converted.case.save_dtype), path


def test_both_readers_return_what_is_on_disk(converted: Converted) -> None:
    for weights in (oracle.read_for_pretraining(converted.config), converted.model.weights):
        assert weights.keys() == converted.disk.keys()
        for path, array in converted.disk.items():
            np.testing.assert_array_equal(weights[path], array.astype(weights[path].dtype), err_msg=path)


def test_logits_equal_transformers(converted: Converted) -> None:
    assert 0.5 < converted.expected.std() < 10, "the tolerance is meant for logits of scale one"
    assert converted.error() < TOLERANCE


def test_a_wrong_conversion_would_be_seen(converted: Converted) -> None:
    """The controls: each mistake a converter can make without changing a shape changes the logits."""
    errors = {name: converted.error(change) for name, change in _mistakes(converted)}
    unseen = {name: error for name, error in errors.items() if error < VISIBLE}
    assert not unseen, f"these mistakes would pass: {unseen}"
    assert converted.error() < TOLERANCE, "wrong without any mistake, so the mistakes were not tried alone"


def _swap_first_two(axis: int) -> Change:
    """Returns a change that exchanges the first two entries of an axis."""

    def swap(array: np.ndarray) -> np.ndarray:
        order = [1, 0, *range(2, array.shape[axis])]
        return np.take(array, order, axis)

    return swap


def _other_rope_order(rope_dim: int, interleaved: bool) -> Change:
    """Returns a change of the last `rope_dim` columns from interleaved pairs to halves, or back."""
    halves_of_interleaved = np.arange(rope_dim).reshape(-1, 2).T.ravel()
    order = halves_of_interleaved if interleaved else np.argsort(halves_of_interleaved)

    def permute(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[..., :-rope_dim], array[..., -rope_dim:][..., order]], axis=-1)

    return permute


def _exchanged(some: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns leaves with the values of their counterparts."""
    return dict(zip(some, others.values(), strict=True)) | dict(zip(others, some.values(), strict=True))


def _mistakes(converted: Converted) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields mistakes, by name, as changed leaves."""
    case, changed = converted.case, converted.changed
    mla, gpt_oss = "kv_lora_rank" in case.config, case.architecture == "gpt_oss"
    if mla:
        query = "wq_b/kernel" if case.config["q_lora_rank"] else "query/kernel"
        rope = _other_rope_order(case.config["qk_rope_head_dim"], interleaved=True)
        yield "RoPE order", changed(query, rope) | changed("wkv_a/kernel", rope)
        yield "heads of kv_b exchanged", changed("wkv_b/kernel", _swap_first_two(-2))
    else:
        query = "query/kernel"
        rope = _other_rope_order(case.config["head_dim"], interleaved=case.model_name.startswith("llama3.1"))
        yield "RoPE order", changed(query, rope) | changed("key/kernel", rope)
        yield "heads of the key exchanged", changed("key/kernel", _swap_first_two(-2))
        # MaxText scales gpt-oss' queries itself.
        name, power = ("query scaled", -0.5) if gpt_oss else ("no query scale", 0.5)
        yield name, changed(query, lambda array: array * case.config["head_dim"] ** power)
    yield "heads of the query exchanged", changed(query, _swap_first_two(-2))
    yield "heads of the output exchanged", changed("/out/kernel", _swap_first_two(0))
    kernel = "" if gpt_oss else "/kernel"
    yield "gate and up exchanged", _exchanged(changed(f"wi_0{kernel}", np.copy), changed(f"wi_1{kernel}", np.copy))
    for norm in ("pre_self_attention_layer_norm/scale", "post_self_attention_layer_norm/scale", "decoder_norm/scale"):
        yield f"{norm} missed", changed(norm, np.ones_like)
    if gpt_oss or "n_routed_experts" in case.config:
        yield "experts exchanged", changed("/wo", _swap_first_two(0))
        yield "router's columns exchanged", changed("gate/kernel", _swap_first_two(-1))
    for bias in _BIASES:
        if any(path.endswith(bias) for path in converted.disk):
            yield f"{bias} missed", changed(bias, np.zeros_like)
    if gpt_oss:
        yield from _gpt_oss_mistakes(converted)
    if converted.scan_layers:
        name = "wkv_b/kernel" if mla else "value/kernel"
        leaves = {path: leaf for path, leaf in converted.model.weights.items() if path.endswith(name)}
        swap = _swap_first_two(1)
        yield "layers exchanged", {path: swap(leaf) for path, leaf in leaves.items() if leaf.shape[1] > 1}


def _gpt_oss_mistakes(converted: Converted) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields the mistakes that only a gpt-oss checkpoint allows."""
    changed, weights = converted.changed, converted.model.weights
    yield "sinks missed", changed("sinks", np.zeros_like)
    yield "heads of the sinks exchanged", changed("sinks", _swap_first_two(0))
    for part in ("", "_bias"):
        halves = {}
        for path in changed(f"wi_0{part}", np.copy):
            gate, up = path, path.replace("wi_0", "wi_1")
            interleaved = np.stack([weights[gate], weights[up]], -1)
            halves[gate], halves[up] = np.split(interleaved.reshape(*weights[gate].shape[:-1], -1), 2, -1)
        yield f"gate_up{part} cut into halves", halves
    # The layers 2b and 2b + 1, which are leaves of their own in scanned trees too.
    other = {path: re.sub(r"layers_(\d+)", lambda match: f"layers_{int(match[1]) ^ 1}", path) for path in weights}
    yield "layers of a cycle exchanged", {path: weights[other[path]] for path in weights if path != other[path]}
