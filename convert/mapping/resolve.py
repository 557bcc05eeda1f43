"""Matches a model's rules with a checkpoint's tensors: every source tensor is used once, or ignored with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass

from slicecast.convert.box import Box, Shape
from slicecast.convert.codecs import detect
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import PlanErrors, SlicecastError, UnusedTensorError
from slicecast.convert.mapping.rules import Model
from slicecast.convert.mapping.target import Layout, Leaf, leaves
from slicecast.convert.source.checkpoint import Checkpoint

# Errors of one kind after which the rest are counted instead of listed: a missing shard file loses thousands of
# tensors.
_ERRORS_LISTED = 10


@dataclass(frozen=True)
class ResolvedLeaf:
    """A leaf and the stored tensors that fill it.

    Attributes:
        leaf: The leaf.
        sources: The stored tensors by stack coordinate, one index for each stacked axis.
    """

    leaf: Leaf
    sources: dict[Shape, StoredTensor]


@dataclass(frozen=True)
class Ignored:
    """Tensors left out for one reason.

    Attributes:
        why: The reason.
        count: How many tensors.
        nbytes: Their size in bytes.
    """

    why: str
    count: int
    nbytes: int


def resolve(
    checkpoint: Checkpoint, model: Model, layout: Layout, quantization: QuantizationConfig | None
) -> tuple[list[ResolvedLeaf], list[Ignored]]:
    """The leaves with their sources, and what is left out.

    Raises:
        PlanErrors: All missing, surplus, misshapen and unsupported tensors, together.
    """
    errors: list[SlicecastError] = []
    resolved = []
    used: set[str] = set()
    failed: set[str] = set()
    for rule in model.rules:
        for leaf in leaves(rule, layout):
            sources = {}
            for coordinate in leaf.coordinates(Box.whole(leaf.shape)):
                name = leaf.source(coordinate)
                try:
                    stored = detect.find(name, rule.shape, checkpoint.tensors, quantization)
                except SlicecastError as error:
                    errors.append(error)
                    failed.add(_module(name))
                else:
                    used.update(stored.names)
                    sources[coordinate] = stored
            resolved.append(ResolvedLeaf(leaf, sources))
    ignored, unused = _leftovers(checkpoint, model, used, failed)
    if errors or unused:
        raise PlanErrors(_abridge(errors + unused))
    return resolved, ignored


def _module(name: str) -> str:
    """The module that a tensor belongs to: `a.b` of `a.b.weight`, `a.b.weight_scale` and `a.b.weight.absmax`."""
    module, weight, _ = name.partition(".weight")
    return module if weight else name.rpartition(".")[0]


def _leftovers(
    checkpoint: Checkpoint, model: Model, used: set[str], failed: set[str]
) -> tuple[list[Ignored], list[SlicecastError]]:
    """What the rules left: ignored tensors by reason, and an error for each that no rule ignores.

    A weight that could not be used (its module is in `failed`) leaves its partners over; only the cause is reported.
    """
    counts: dict[str, Ignored] = {}
    unused: list[SlicecastError] = []
    for name, tensor in checkpoint.tensors.items():
        if name in used or _module(name) in failed:
            continue
        why = next((ignore.why for ignore in model.ignores if ignore.matches(name)), None)
        if why is None and detect.is_runtime_only(name):
            why = detect.RUNTIME_ONLY_REASON
        if why is None:
            cause = "is a scale that no weight uses" if "scale" in name.rpartition(".")[2] else "is read by no rule"
            unused.append(
                UnusedTensorError(
                    f"{tensor.file}: tensor '{name}' ({tensor.dtype}{list(tensor.shape)}) {cause} of the family "
                    f"'{model.family}'. Either config.json does not belong to these weights, or the model has a part "
                    "that slicecast does not know."
                )
            )
        else:
            before = counts.get(why, Ignored(why, 0, 0))
            counts[why] = Ignored(why, before.count + 1, before.nbytes + tensor.nbytes)
    return list(counts.values()), unused


def _abridge(errors: Sequence[SlicecastError]) -> list[SlicecastError]:
    """The first errors of each kind, the last of them with the number of the others."""
    kinds: dict[type[SlicecastError], list[SlicecastError]] = {}
    for error in errors:
        kinds.setdefault(type(error), []).append(error)
    shown: list[SlicecastError] = []
    for kind, members in kinds.items():
        shown += members[:_ERRORS_LISTED]
        if len(members) > _ERRORS_LISTED:
            shown.append(kind(f"... and {len(members) - _ERRORS_LISTED} more like these."))
    return shown
