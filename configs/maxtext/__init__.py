"""Snapshots of the abstract parameter trees of MaxText releases: one folder a release, one JSON file a model.

A file holds `scanned` and `unscanned`, each a map from a leaf's path to its shape and the logical names of its axes.
Paths begin with the leaf's collection. In unscanned trees equal layers are written once, with `{}` for the layer's
number and with their count.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from slicecast.convert.errors import TargetError
from slicecast.convert.mapping.target import ROOT, Layout, Leaf

VERSION = "0.2.5"

# The router's bias is a variable of a collection of its own. On disk it belongs to `params`: the one spelling that both
# of MaxText's loaders find.
_COLLECTIONS = {"params": ROOT, "MoEBiasVar": ROOT}

# Differences shown; a wrong model name makes all leaves differ.
_SHOWN = 5


@dataclass(frozen=True)
class TargetLeaf:
    """A leaf as MaxText has it.

    Attributes:
        path: Its path on disk.
        shape: Its shape.
        axes: The logical names of its axes.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def model_names() -> list[str]:
    """The models for which there is a snapshot."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir())


@functools.lru_cache(maxsize=8)
def target_leaves(model_name: str, scan_layers: bool) -> tuple[TargetLeaf, ...]:
    """The tree that MaxText has for a model, with `param_scan_axis` 1.

    Raises:
        TargetError: If there is no snapshot for this name.
    """
    if model_name not in model_names():
        raise TargetError(
            f"--model_name={model_name}: there is no snapshot of this model of MaxText {VERSION} to check against. "
            f"There is: {', '.join(model_names())}. To convert without the check, add "
            "--override_model_config."
        )
    tree = json.loads((_folder() / f"{model_name}.json").read_text())
    return tuple(_expand(tree["scanned" if scan_layers else "unscanned"].items()))


def check(model_name: str, layout: Layout, leaves: Iterable[Leaf]) -> None:
    """Checks that the leaves are those that MaxText has for a model.

    Raises:
        TargetError: If one is missing, surplus, or of another shape.
    """
    expected = {leaf.path: leaf.shape for leaf in target_leaves(model_name, layout.scan_layers)}
    found = {leaf.path: leaf.shape for leaf in leaves}
    if layout.scan_layers and layout.param_scan_axis != 1:
        # The snapshots have the layers on axis 1; with another position, compare the sizes in any order.
        expected = {path: tuple(sorted(shape)) for path, shape in expected.items()}
        found = {path: tuple(sorted(shape)) for path, shape in found.items()}
    problems = [f"'{path}' is missing" for path in expected.keys() - found.keys()]
    problems += [f"'{path}' is not in MaxText's model" for path in found.keys() - expected.keys()]
    problems += [
        f"'{path}' is {list(found[path])}, in MaxText's model it is {list(expected[path])}"
        for path in expected.keys() & found.keys()
        if expected[path] != found[path]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise TargetError(
            f"--model_name={model_name}: {len(problems)} leaves differ from MaxText {VERSION}'s model: {shown}. "
            "Give the name of the model that the checkpoint is; if its sizes differ on purpose, add "
            "--override_model_config."
        )


def _expand(items: Iterable[tuple[str, list[Any]]]) -> Iterator[TargetLeaf]:
    for pattern, (shape, axes, *count) in items:
        collection, _, path = pattern.partition("/")
        for layer in range(count[0] if count else 1):
            yield TargetLeaf(f"{_COLLECTIONS[collection]}/{path.format(layer)}", tuple(shape), tuple(axes))


def _folder() -> resources.abc.Traversable:
    return resources.files(__name__) / VERSION
