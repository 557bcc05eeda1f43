"""A converted checkpoint loads in MaxText, and computes what transformers computes from the source.

Run by scripts/test_maxtext.sh, which writes the sources and converts them.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from case import Case, Layout
from cases import CASES
from mistakes import exchanged_layers, mistakes

pytestmark = pytest.mark.maxtext

# A right conversion differs by the rounding of float32, at most 7e-6 here; every mistake by a thousand times more.
TOLERANCE = 1e-5
VISIBLE = 1e-2

# Small leaves that are float32 whatever is asked for, and what text does not reach.
_ALWAYS_FLOAT32 = ("MoeBlock_0/gate/bias",)
_NO_TEXT = ("vision_encoder/", "audio_encoder/", "mtp_block/")


class Converted:
    """A converted checkpoint, what MaxText makes of it, and what transformers computed from its source."""

    def __init__(self, case: Case, layout: Layout, sources: Path) -> None:
        self.case = case
        self.layout = layout
        self.items = sources / case.name / layout / "0" / "items"
        if not self.items.is_dir():
            raise FileNotFoundError(f"{self.items} is missing: run scripts/test_maxtext.sh, which converts the sources")
        self.config: Any = oracle.config(case, layout, self.items)
        self.disk = oracle.read_disk(self.items)
        with np.load(sources / case.name / "expected.npz") as expected:
            self.expected = dict(expected)

    @functools.cached_property
    def model(self) -> oracle.Model:
        """MaxText's model, loaded when first needed: the test of the tree tells more about a missing leaf."""
        return oracle.Model(self.config)

    def logits(self, changes: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Returns MaxText's logits, with `changes` in place of loaded leaves."""
        return self.model.logits(self.expected["ids"], self.expected["positions"], changes or {})

    def error(self, changes: Mapping[str, np.ndarray] | None = None) -> float:
        """Returns the largest difference of MaxText's logits from transformers'."""
        tokens = self.case.tokens
        return float(np.abs(self.logits(changes)[..., :tokens] - self.expected["logits"][..., :tokens]).max())


@pytest.fixture(
    scope="module",
    params=[(case, layout) for case in CASES for layout in case.layouts],
    ids=lambda parameter: f"{parameter[0].name}-{parameter[1]}",
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
        assert array.dtype.name == ("float32" if path.endswith(_ALWAYS_FLOAT32) else converted.case.save_dtype), path


def test_both_readers_return_what_is_on_disk(converted: Converted) -> None:
    for weights in (oracle.read_for_pretraining(converted.config), converted.model.weights):
        assert weights.keys() == converted.disk.keys()
        for path, array in converted.disk.items():
            np.testing.assert_array_equal(weights[path], array.astype(weights[path].dtype), err_msg=path)


def test_logits_equal_transformers(converted: Converted) -> None:
    assert 0.5 < converted.expected["logits"].std() < 10, "the tolerance is meant for logits of scale one"
    error = converted.error()
    print(f"ERROR {converted.case.name} {converted.layout} {error:.1e}")
    assert error < TOLERANCE


def test_rows_that_fill_up_the_vocabulary_give_nothing(converted: Converted) -> None:
    assert not converted.logits()[..., converted.case.tokens :].any()


def test_a_wrong_conversion_would_be_seen(converted: Converted) -> None:
    """The controls: each mistake a converter can make without changing a shape changes the logits."""
    weights = {path: leaf for path, leaf in converted.model.weights.items() if not path.startswith(_NO_TEXT)}
    tried = mistakes(converted.case, weights) if converted.layout == "unscanned" else exchanged_layers(weights)
    errors = {name: converted.error(changes) for name, changes in tried}
    assert errors, "nothing was tried"
    unseen = {name: error for name, error in errors.items() if error < VISIBLE}
    assert not unseen, f"these mistakes would pass: {unseen}"
    assert converted.error() < TOLERANCE, "wrong without any mistake, so the mistakes were not tried alone"
