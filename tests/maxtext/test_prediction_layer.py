"""A converted layer for multi-token prediction has the loss, in MaxText, that its published definition has."""

from pathlib import Path

import pytest
from cases import CASES
from converted import TOLERANCE, Converted
from mistakes import mistakes

pytestmark = pytest.mark.maxtext

# The loss is a mean over the text, in which much of a difference cancels.
VISIBLE = 20 * TOLERANCE


@pytest.fixture(
    scope="module",
    params=[(case, layout) for case in CASES if case.predicts_more for layout in case.layouts],
    ids=lambda parameter: f"{parameter[0].name}-{parameter[1]}",
)
def converted(request: pytest.FixtureRequest, sources: Path) -> Converted:
    """Each converted checkpoint with such a layer."""
    return Converted(*request.param, sources)


def test_loss_is_that_of_the_definition(converted: Converted) -> None:
    error = converted.prediction_error()
    print(f"\n{converted.case.name}, {converted.layout}: the loss differs by {error:.1e}")
    assert error < TOLERANCE


def test_a_wrong_conversion_would_be_seen(converted: Converted) -> None:
    """The controls; the layer stands alone in scanned models too."""
    layer = {path: leaf for path, leaf in converted.model.weights.items() if path.startswith("mtp_block/")}
    errors = {name: converted.prediction_error(changes) for name, changes in mistakes(converted.case, layer)}
    assert errors, "nothing was tried"
    unseen = {name: error for name, error in errors.items() if error < VISIBLE}
    assert not unseen, f"these mistakes would pass: {unseen}"
