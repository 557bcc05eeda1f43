"""Rules: what a model family's tensors are called, where they go, and how they change on the way.

A rule is written once per kind of tensor, with placeholders for the layer and the expert:

    Rule("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", (intermediate, hidden),
         "decoder/{layers}/MoeBlock_0/wi_0", (Transpose(),), ("embed_moe", "mlp_moe"), layers, experts=256)

`{layer}` and `{expert}` run over the rule's `layers` and `experts`. Whether the layers are an axis of the target leaf
(scanned) or part of its path (unscanned), and at which position the axis stands, belongs to the target layout
(`target.py`), not to the rule: one table serves both. `table.py` is how families write rules down.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slicecast.convert.box import Shape
from slicecast.convert.mapping.ops import Op


@dataclass(frozen=True, slots=True)
class LayerAxis:
    """An axis over which MaxText stacks layers when it scans.

    Attributes:
        name: Its logical name.
        size: How many layers, or blocks of layers, are stacked.
        step: The distance between the numbers of neighbors: 1, or the length of a cycle.
    """

    name: str
    size: int
    step: int = 1


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one kind, which MaxText scans over together.

    Where kinds of layers take turns, MaxText scans over their cycle, and each place in it is a kind. Where several
    places are alike, they may be scanned over within each cycle: then there are two axes. A layer that stands alone in
    scanned models too has none.

    Attributes:
        start: The number of the first layer in the checkpoint.
        axes: The stacked axes, outermost first.
        scanned: What stands for the layers in the paths of scanned trees.
        unscanned: What stands for one of them in the paths of unscanned trees, where `{layer}` is its number in the
            checkpoint and `{index}` its place among these layers.
    """

    start: int
    axes: tuple[LayerAxis, ...]
    scanned: str
    unscanned: str = "layers_{layer}"


def stacked(name: str, size: int, start: int = 0) -> Layers:
    """Layers that follow each other and are numbered by themselves, such as `dense_layers_0`."""
    return Layers(start, (LayerAxis(name, size),), name, f"{name}_{{index}}")


def cycle(layers: int, places: int, scanned: str, *, axis: str = "layers", start: int = 0) -> list[Layers]:
    """For each place in a cycle of so many places, the layers that stand there.

    Args:
        layers: How many layers there are: a whole number of cycles.
        places: The length of a cycle.
        scanned: The path of a place in scanned trees, with `{}` for its number.
        axis: The logical name of the stacked axis.
        start: The number of the first layer.
    """
    repeats = LayerAxis(axis, layers // places, places)
    return [Layers(start + place, (repeats,), scanned.format(place)) for place in range(places)]


def nested_cycle(layers: int, places: int, scanned: str) -> tuple[Layers, Layers]:
    """Cycles in which all layers are alike but the last: MaxText scans over those, within each cycle.

    Args:
        layers: How many layers there are: a whole number of cycles.
        places: The length of a cycle.
        scanned: The path of the cycles in scanned trees.

    Returns:
        The layers that are alike, and the last ones.
    """
    repeats = LayerAxis("layers", layers // places, places)
    local = Layers(0, (repeats, LayerAxis("local_layers", places - 1)), f"{scanned}/local_layers")
    return local, Layers(places - 1, (repeats,), f"{scanned}/global_layer")


@dataclass(frozen=True, slots=True)
class Join:
    """A source tensor that is made of rows of several stored tensors, taken from each in turn.

    Attributes:
        members: The stored tensors: name, with placeholders, and shape.
        takes: Of which member which rows are taken, as (member, start, stop).
        groups: How many times the takes are gone through; each time, each gives an equal part of its rows.
    """

    members: tuple[tuple[str, Shape], ...]
    takes: tuple[tuple[int, int, int], ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A source tensor that no checkpoint has, all elements of which are equal.

    Attributes:
        value: The elements.
        why: Why MaxText has it and the checkpoint does not.
    """

    value: float
    why: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of source tensor, and the leaf or leaves it becomes.

    Attributes:
        source: The name of the tensor with `{layer}` and `{expert}`, or how it is made.
        shape: The shape that `config.json` gives the tensor.
        target: The path of the leaf below `params/params`, with `{layers}` for the layers.
        ops: What happens to each tensor on the way, first to last.
        axes: MaxText's logical names of the target's axes, for one tensor: without the stacked ones.
        layers: The layers over which the pattern runs.
        experts: The number of experts over which it runs; they are stacked in unscanned trees too, and lead the leaf.
        dtype: The dtype on disk if it is not the one of `--save_dtype`.
        scan_axis: The position of the layer axis if it is not the one of `--param_scan_axis`.
        stored_rows: How many rows the checkpoint has of the tensor, if the model has more (zeros follow) or fewer.
    """

    source: str | Join | Constant
    shape: Shape
    target: str
    ops: tuple[Op, ...] = ()
    axes: tuple[str | None, ...] = ()
    layers: Layers | None = None
    experts: int | None = None
    dtype: str | None = None
    scan_axis: int | None = None
    stored_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Ignore:
    """Source tensors that are left out on purpose.

    Attributes:
        pattern: A regular expression that the whole name matches.
        why: The reason, printed by `plan` and `convert`.
        copy_of: The target of the rule whose tensor they repeat, which is checked before anything is written; None if
            they are left out whatever they hold.
    """

    pattern: str
    why: str
    copy_of: str | None = None

    def matches(self, name: str) -> bool:
        """Whether this tensor is left out."""
        return re.fullmatch(self.pattern, name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the user says about the model, beside its `config.json`.

    Attributes:
        model_name: MaxText's name of the model.
        rope_type: MaxText's rotary embedding that the model will run with.
        enable_mtp: Whether to convert the layers for multi-token prediction.
        use_multimodal: Whether to convert vision and audio; None for what MaxText does by default.
        vocab_size: The vocabulary of the MaxText model, if it is not the checkpoint's.
    """

    model_name: str | None = None
    rope_type: str | None = None
    enable_mtp: bool = False
    use_multimodal: bool | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint's model as its `config.json` describes it.

    Attributes:
        family: The name of the family whose rules apply.
        description: One line for people: the architecture and its sizes.
        rules: How each kind of tensor converts.
        other_forms: Other rules for the same model, for checkpoints that store it otherwise, experts one by one for
            example. The form that fits the checkpoint's tensors best is taken.
        ignores: Which tensors are left out, and why.
        notes: Decisions that the config alone did not settle, for the plan to print.
        unscanned_only: Why MaxText has this model unscanned only; empty if it has it scanned too.
        spellings: Other ways in which checkpoints of the same model spell names: prefixes of the rules' names, and what
            stands in their place.
    """

    family: str
    description: str
    rules: Sequence[Rule]
    other_forms: Sequence[Sequence[Rule]] = ()
    ignores: Sequence[Ignore] = ()
    notes: Sequence[str] = ()
    unscanned_only: str = ""
    spellings: Sequence[Mapping[str, str]] = ()
