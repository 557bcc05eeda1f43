"""A converted checkpoint loads in MaxText, and computes what transformers computes from the source.

Run by scripts/test_maxtext.sh, which writes the sources and converts them.
"""

import re
from pathlib import Path

import numpy as np
import oracle
import pytest
from case import SAVE_DTYPES, SaveDtype, items
from cases import CASES
from converted import TOLERANCE, VISIBLE, Converted
from mistakes import exchanged_layers, mistakes

pytestmark = pytest.mark.maxtext

# What text does not reach.
_NO_TEXT = ("vision_encoder/", "audio_encoder/", "mtp_block/")

# Small leaves that are float32 whatever is asked for: in bfloat16 a bias of the router could choose other experts, a
# norm that is near one would lose what makes it differ from one, and a state would decay at another speed.
_ALWAYS_FLOAT32 = {
    "deepseek_v3": r"gate/bias$",
    "deepseek_v32": r"gate/bias$",
    "deepseek_v4": r"(gate/bias|tid2eid|hc_head/\w+|_alpha|_beta|_alpha_scale|position_bias|sinks)$",
    "gemma": r"^decoder/.*norm\w*/scale$",
    "gemma2": r"^decoder/.*norm\w*/scale$",
    "gemma3": r"^(decoder/.*norm\w*|.*mm_soft_embedding_norm)/scale$",
    "qwen3_5_moe": r"(A_log|dt_bias)$",
    "qwen3_next": r"(A_log|dt_bias)$",
}


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


@pytest.mark.parametrize("save_dtype", SAVE_DTYPES)
def test_dtype_is_the_one_asked_for(converted: Converted, save_dtype: SaveDtype, sources: Path) -> None:
    case = converted.case
    always = re.compile(_ALWAYS_FLOAT32.get(case.architecture, r"(?!)"))
    for path, array in oracle.read_disk(items(sources / case.name, "slicecast", save_dtype, converted.layout)).items():
        assert array.dtype.name == ("float32" if always.search(path) else save_dtype), path


def test_both_readers_return_what_is_on_disk(converted: Converted) -> None:
    for weights in (oracle.read_for_pretraining(converted.config), converted.model.weights):
        assert weights.keys() == converted.disk.keys()
        for path, array in converted.disk.items():
            np.testing.assert_array_equal(weights[path], array.astype(weights[path].dtype), err_msg=path)


def test_logits_equal_transformers(converted: Converted) -> None:
    assert 0.5 < converted.expected["logits"].std() < 10, "the tolerance is meant for logits of scale one"
    error = converted.error()
    print(f"\n{converted.case.name}, {converted.layout}: logits differ by {error:.1e}")
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
