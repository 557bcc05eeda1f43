"""Snapshots of the parameter trees of MaxText releases: one folder a release, one JSON file a model.

`scripts/snapshot_maxtext.py` writes them from an installed MaxText; `snapshot` describes a file.
"""

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources

from slicecast.configs.maxtext import snapshot
from slicecast.configs.maxtext.snapshot import Refusal, TargetLeaf
from slicecast.convert.errors import TargetError
from slicecast.convert.mapping.target import ROOT, Layout, Leaf

__all__ = ["VERSION", "TargetLeaf", "check", "features", "model_names", "target_leaves", "versions"]

# MaxText keeps the router's bias, and DeepSeek-V4's table from tokens to experts, in collections of their own. On disk
# they belong to `params`: the one spelling that both of MaxText's loaders find.
_COLLECTIONS = {"params": ROOT, "MoEBiasVar": ROOT, "Tid2EidVar": ROOT}

# Differences shown; a wrong model name makes all leaves differ.
_SHOWN = 5


def versions() -> list[str]:
    """The MaxText releases for which there are snapshots, from the oldest to the newest."""
    names = [folder.name for folder in resources.files(__name__).iterdir() if re.match(r"\d", folder.name)]
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


VERSION = versions()[-1]
"""The newest of the releases."""


def model_names(version: str = VERSION) -> list[str]:
    """The models for which there is a snapshot.

    Raises:
        TargetError: If there are no snapshots of this release.
    """
    if version not in versions():
        raise TargetError(
            f"--maxtext_version={version}: there are no snapshots of this release, only of {', '.join(versions())}. "
            "Give one of these, or make them with scripts/snapshot_maxtext.py."
        )
    return sorted(file.name.removesuffix(".json") for file in _folder(version).iterdir())


def features(model_name: str, version: str = VERSION) -> frozenset[str]:
    """The layouts that MaxText has of a model; `multimodal_scanned` and the like are what comes on top of them."""
    found = snapshot.loads((_folder(version) / f"{model_name}.json").read_text())
    return frozenset(name for name, layout in found.layouts.items() if not isinstance(layout, Refusal))


@functools.lru_cache(maxsize=8)
def target_leaves(
    model_name: str,
    scan_layers: bool,
    *,
    enable_mtp: bool = False,
    use_multimodal: bool | None = None,
    version: str = VERSION,
) -> tuple[TargetLeaf, ...]:
    """The tree that MaxText has for a model, with `param_scan_axis` 1, by paths on disk.

    Args:
        model_name: MaxText's name of the model.
        scan_layers: Whether layers are stacked into one leaf.
        enable_mtp: Whether the model has a layer for multi-token prediction (`mtp_num_layers=1`).
        use_multimodal: Whether it has its encoders of images and audio; None for the model's own setting in MaxText.
        version: The MaxText release.

    Raises:
        TargetError: If there is no snapshot for this name and release, or MaxText has no such model.
    """
    names = model_names(version)
    if model_name not in names:
        close = " or ".join(difflib.get_close_matches(model_name, names))
        raise TargetError(
            f"--model_name={model_name}: there is no snapshot of this model of MaxText {version} to check against. "
            + (f"Did you mean {close}? " if close else "")
            + f"There is: {', '.join(names)}. To convert without the check, add --override_model_config."
        )
    found = snapshot.loads((_folder(version) / f"{model_name}.json").read_text())
    layout = "scanned" if scan_layers else "unscanned"
    # The name in the file, what it means if it is not there, and what to do about it.
    parts = [(layout, "", f"--scan_layers={str(not scan_layers).lower()}")]
    if found.use_multimodal if use_multimodal is None else use_multimodal:
        parts.append((f"multimodal_{layout}", "the model has no encoders of images or audio", "--use_multimodal=false"))
    if enable_mtp:
        absent = "the model has no layer for multi-token prediction, or none that its releases have"
        parts.append((f"mtp_{layout}", absent, "--enable_mtp=false"))
    leaves: list[TargetLeaf] = []
    for name, absent, instead in parts:
        part = found.layouts.get(name, Refusal(absent))
        if isinstance(part, Refusal):
            raise TargetError(
                f"--model_name={model_name}: not with these flags in MaxText {version}: {part.reason}. Give {instead}."
            )
        leaves += part
    return tuple(replace(leaf, path=_path_on_disk(leaf.path)) for leaf in leaves)


def check(
    model_name: str,
    layout: Layout,
    leaves: Iterable[Leaf],
    *,
    enable_mtp: bool = False,
    use_multimodal: bool | None = None,
    version: str = VERSION,
) -> None:
    """Checks that the leaves are those that MaxText has for a model.

    Args:
        model_name: MaxText's name of the model.
        layout: The layout of the leaves.
        leaves: The leaves to check.
        enable_mtp: Whether the model has a layer for multi-token prediction.
        use_multimodal: Whether it has its encoders of images and audio; None for the model's own setting in MaxText.
        version: The MaxText release.

    Raises:
        TargetError: If one is missing, surplus, or of another shape, or there is nothing to compare with.
    """
    target = target_leaves(
        model_name, layout.scan_layers, enable_mtp=enable_mtp, use_multimodal=use_multimodal, version=version
    )
    expected = {leaf.path: leaf.shape for leaf in target}
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
            f"--model_name={model_name}: {len(problems)} leaves differ from MaxText {version}'s model: {shown}. "
            "Give the name of the model that the checkpoint is; if its sizes differ on purpose, add "
            "--override_model_config."
        )


def _path_on_disk(path: str) -> str:
    collection, _, rest = path.partition("/")
    return f"{_COLLECTIONS[collection]}/{rest}"


def _folder(version: str) -> resources.abc.Traversable:
    return resources.files(__name__) / version
