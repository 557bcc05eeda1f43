"""The plan of every model at its full size, from headers alone, gives exactly the tree that MaxText has for it.

Headers are those of the published checkpoints (`published_models.py`), MaxText's trees come from its snapshots.
"""

import time

import published_models
import pytest

from slicecast.configs import families, maxtext
from slicecast.convert import plan
from slicecast.convert.codecs import quantization_config
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping import resolve
from slicecast.convert.mapping.rules import ModelOptions
from slicecast.convert.mapping.target import FP8, Layout
from slicecast.convert.memory import GB, Machine
from slicecast.convert.plan import Plan

# MaxText has these unscanned only.
UNSCANNED_ONLY = ("gemma4-e2b", "gemma4-e4b", "qwen3-omni-30b-a3b", "qwen3-vl-2b", "qwen3-vl-30b-a3b", "qwen3-vl-4b")
UNSCANNED_ONLY += ("weaver-max", "weaver-mini")

# Those whose release has a layer for multi-token prediction and for which MaxText has one too.
WITH_MTP = ("deepseek3-671b", "deepseek3.2-671b")

TREES = [
    (name, scan_layers)
    for name in published_models.names()
    for scan_layers in (True, False)
    if not (scan_layers and name in UNSCANNED_ONLY)
]


def planned(name: str, scan_layers: bool, *, enable_mtp: bool = False) -> Plan:
    """The plan for a slice of four hosts; every tensor of the release is read, or ignored with a reason."""
    checkpoint = published_models.checkpoint(name)
    model = families.recognize(checkpoint.config, ModelOptions(model_name=name, enable_mtp=enable_mtp))
    layout = Layout(scan_layers, save_dtype=FP8 if name.endswith("-fp8") else "bfloat16")
    quantization = quantization_config.read(checkpoint.config, {})
    resolved, ignored = resolve.resolve(checkpoint, model, layout, quantization)
    machine = Machine(hosts=4, devices=4, host_bytes=96 * GB, device_bytes=12 * GB)
    return plan.make(checkpoint, model, layout, "", resolved, ignored, machine)


def check(found: Plan, name: str, scan_layers: bool, *, enable_mtp: bool = False) -> None:
    """Compares paths, shapes and logical axes, leaf by leaf."""
    expected = {leaf.path: leaf for leaf in maxtext.target_leaves(name, scan_layers, enable_mtp=enable_mtp)}
    leaves = {planned.leaf.path: planned.leaf for planned in found.leaves}
    assert leaves.keys() == expected.keys()
    for path, leaf in leaves.items():
        assert leaf.shape == expected[path].shape, path
        axes = expected[path].axes
        # MaxText names no axes of some leaves, or fewer than there are, which says nothing about any one of them.
        if axes is not None and len(axes) == len(leaf.shape):
            assert leaf.axes == axes, path
        else:
            assert not set(leaf.axes) & {"exp", "vocab", "mlp_moe"}, path


def test_there_are_48_models() -> None:
    assert len(published_models.names()) == 48
    assert len(TREES) == 2 * 48 - len(UNSCANNED_ONLY)


@pytest.mark.parametrize(("name", "scan_layers"), TREES)
def test_leaves_are_exactly_those_of_maxtext(name: str, scan_layers: bool) -> None:
    begun = time.process_time()
    found = planned(name, scan_layers)
    seconds = time.process_time() - begun
    check(found, name, scan_layers)
    # A plan reads each header once and makes each box once, however the layers are laid out.
    assert seconds < 30
    written = {work.leaf.leaf.path: 0 for work in found.boxes}
    for work in found.boxes:
        written[work.leaf.leaf.path] += work.box.size
    for leaf in found.leaves:
        assert written[leaf.leaf.path] == leaf.nbytes // leaf.itemsize


@pytest.mark.parametrize("name", UNSCANNED_ONLY)
def test_maxtext_has_some_models_unscanned_only(name: str) -> None:
    model = families.recognize(published_models.checkpoint(name).config)
    assert model.unscanned_only
    with pytest.raises(TargetError, match="--scan_layers=false"):
        maxtext.target_leaves(name, True)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", WITH_MTP)
def test_layers_for_multi_token_prediction(name: str, scan_layers: bool) -> None:
    found = planned(name, scan_layers, enable_mtp=True)
    check(found, name, scan_layers, enable_mtp=True)
    (shared,) = [ignored for ignored in found.ignored if "shares" in ignored.why]
    assert shared.count == 2


def test_fp8_models_in_bfloat16() -> None:
    """The same release, decoded, is the tree of the model without `-fp8`."""
    checkpoint = published_models.checkpoint("qwen3.5-35b-a3b-fp8")
    model = families.recognize(checkpoint.config)
    quantization = quantization_config.read(checkpoint.config, {})
    resolved, _ = resolve.resolve(checkpoint, model, Layout(True), quantization)
    maxtext.check("qwen3.5-35b-a3b", Layout(True), [item.leaf for item in resolved])
