"""The rules lead back: from the leaves of a checkpoint every source tensor is put together again, bit for bit.

This is what converting back to Hugging Face's names will stand on. Leaves are float32 here: where a rule computes, the
result is exact enough that rounding it back to the source's dtype gives the source's bits.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models

from slicecast.convert import orbax_checkpoint
from slicecast.convert.box import Box
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.rules import Constant, Join
from slicecast.convert.mapping.target import Layout, Leaf, leaves

Array = np.ndarray

DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "I64": np.int64}


class Sources:
    """Source tensors that are put together piece by piece."""

    def __init__(self) -> None:
        self._values: dict[str, Array] = {}
        self._times: dict[str, Array] = {}

    def put(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...], values: Array) -> None:
        """Fills a part of a tensor. A tensor that fills two leaves, as a tied embedding does, is the same in both."""
        if name not in self._values:
            self._values[name] = np.zeros(shape, np.float32)
            self._times[name] = np.zeros(shape, np.int8)
        filled = self._times[name][index] > 0
        np.testing.assert_array_equal(self._values[name][index][filled], values[filled])
        self._values[name][index] = values
        self._times[name][index] += 1

    def whole(self) -> dict[str, Array]:
        """The tensors, all elements of which have come."""
        assert all(times.all() for times in self._times.values())
        return self._values


def undo(leaf: Leaf, values: Array, sources: Sources) -> None:
    """Puts the elements of a leaf where they came from."""
    rule = leaf.rule
    if isinstance(rule.source, Constant):
        assert (values == rule.source.value).all()
        return
    index, rest = ops.taken(rule.ops, rule.shape)
    shape = np.zeros(rule.shape, np.bool)[index].shape
    back = ops.invert(rest, shape)
    shapes = [leaf.element_shape]
    for op in back:
        shapes.append(op.shape(shapes[-1]))
    for coordinate in leaf.coordinates(Box.whole(leaf.shape)):
        element = values[leaf.element_index(Box.whole(leaf.shape), coordinate)]
        source = np.asarray(ops.apply(back, jnp.asarray(element), shapes[1:]))
        if isinstance(rule.source, Join):
            _take_apart(leaf, rule.source, coordinate, source, sources)
            continue
        name = leaf.source(rule.source, coordinate)
        stored = rule.shape if rule.stored_rows is None else (rule.stored_rows, *rule.shape[1:])
        assert stored[0] <= rule.shape[0], "what was left out is not there to lead back"
        assert not source[stored[0] :].any()
        sources.put(name, stored, index, source[: stored[0]])


def _take_apart(leaf: Leaf, join: Join, coordinate: tuple[int, ...], source: Array, sources: Sources) -> None:
    turns = source.reshape(join.groups, -1, *source.shape[1:])
    start = 0
    for member, first, last in join.takes:
        name, shape = join.members[member]
        share = (last - first) // join.groups
        rows = turns[:, start : start + share].reshape(last - first, *source.shape[1:])
        sources.put(leaf.source(name, coordinate), shape, (slice(first, last),), rows)
        start += share


@pytest.mark.parametrize(("name", "scan_layers"), tiny_models.TREES)
def test_every_tensor_comes_back(slicecast: Any, tmp_path: Path, name: str, scan_layers: bool) -> None:
    model = tiny_models.model(name)
    source, output = tiny_models.write(tmp_path / "source", name, seed=7), tmp_path / "output"
    arguments = [f"--hf_model_path={source}", f"--base_output_directory={output}", "--save_dtype=float32"]
    slicecast.run("convert", *arguments, f"--scan_layers={scan_layers}", "--simulated_cpu_devices_count=1")
    arrays = orbax_checkpoint.open_arrays(output)
    sources = Sources()
    for rule in model.rules:
        for leaf in leaves(rule, Layout(scan_layers, save_dtype="float32")):
            undo(leaf, arrays[leaf.path].read().result(), sources)
    found, expected = sources.whole(), tiny_models.tensors(model, 7)
    assert found.keys() == expected.keys()
    for tensor, (dtype, values) in expected.items():
        back = found[tensor].astype(DTYPES[dtype])
        assert back.tobytes() == np.ascontiguousarray(values).tobytes(), tensor
