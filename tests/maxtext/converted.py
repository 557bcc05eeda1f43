"""A converted checkpoint in MaxText, beside what transformers computed from its source."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from case import Case, Layout, items

# A right conversion differs by the rounding of float32, at most 7e-6 here; every mistake by a thousand times more.
TOLERANCE = 1e-5
VISIBLE = 1e-2


class Converted:
    """A converted checkpoint, what MaxText makes of it, and what transformers computed from its source."""

    def __init__(self, case: Case, layout: Layout, sources: Path) -> None:
        self.case = case
        self.layout = layout
        self.items = items(sources / case.name, "slicecast", case.save_dtype, layout)
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

    def prediction_error(self, changes: Mapping[str, np.ndarray] | None = None) -> float:
        """Returns the difference of the loss of MaxText's multi-token prediction from the one by its definition."""
        loss = self.model.prediction_loss(self.expected["ids"], self.expected["positions"], changes or {})
        return abs(loss - float(self.expected["mtp_loss"]))
