"""Matches a model's rules with a checkpoint's tensors: every source tensor is used once, or ignored with a reason."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slicecast.convert.box import Box, Shape
from slicecast.convert.codecs import constant, detect, joined, plain
from slicecast.convert.codecs.base import FLOAT_DTYPES, StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import PlanErrors, SlicecastError, UnsupportedFormatError, UnusedTensorError
from slicecast.convert.mapping import fp8
from slicecast.convert.mapping.ops import Slice
from slicecast.convert.mapping.rules import Constant, Join, Model, Rule
from slicecast.convert.mapping.target import FP8, Layout, Leaf, leaves
from slicecast.convert.source.checkpoint import Checkpoint
from slicecast.convert.source.safetensors_header import TensorInfo

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
        copies: Those of them that are said to repeat another tensor, each with the other one.
    """

    why: str
    count: int
    nbytes: int
    copies: tuple[tuple[TensorInfo, TensorInfo], ...] = ()


def resolve(
    checkpoint: Checkpoint, model: Model, layout: Layout, quantization: QuantizationConfig | None
) -> tuple[list[ResolvedLeaf], list[Ignored]]:
    """The leaves with their sources, and what is left out.

    Raises:
        PlanErrors: All missing, surplus, misshapen and unsupported tensors, together.
    """
    errors: list[SlicecastError] = []
    resolved: list[ResolvedLeaf] = []
    used: set[str] = set()
    failed: set[str] = set()
    rules, spelling = _form(model, checkpoint)
    for rule in rules:
        for leaf in leaves(rule, layout):
            sources = {}
            for coordinate in leaf.coordinates(Box.whole(leaf.shape)):
                try:
                    stored = _find(leaf, coordinate, checkpoint, spelling, quantization)
                except SlicecastError as error:
                    errors.append(error)
                    failed.update(_module(_spelled(name, spelling)) for name in _names(leaf, coordinate))
                else:
                    used.update(stored.names)
                    sources[coordinate] = stored
            if len(sources) == math.prod(stack.size for _, stack in leaf.stacked):
                try:
                    resolved += _as_stored(ResolvedLeaf(leaf, sources), layout)
                except SlicecastError as error:
                    errors.append(error)
    if layout.save_dtype == FP8 and not errors and not any(item.leaf.dtype == FP8 for item in resolved):
        errors.append(UnsupportedFormatError(f"--save_dtype={FP8}: this checkpoint has no FP8 weights to keep."))
    ignored, unused = _leftovers(checkpoint, model, resolved, used, failed)
    if errors or unused:
        raise PlanErrors(_abridge(errors + unused))
    return resolved, ignored


def _as_stored(resolved: ResolvedLeaf, layout: Layout) -> list[ResolvedLeaf]:
    """What a leaf becomes for the way in which its tensors are stored: itself, but for FP8 that stays FP8."""
    kept = fp8.keep(resolved.leaf, resolved.sources) if layout.save_dtype == FP8 else None
    if kept is None:
        return [_narrowed(resolved)]
    return [ResolvedLeaf(leaf, sources) for leaf, sources in kept]


def _narrowed(resolved: ResolvedLeaf) -> ResolvedLeaf:
    """A leaf that takes a range of its tensors' second axis, such as half of each expert, reading only that.

    Of a tensor that is stored as it is the range is a run of bytes in each row, and needs no op.
    """
    leaf, rule = resolved.leaf, resolved.leaf.rule
    op = rule.ops[0] if rule.ops else None
    if not isinstance(op, Slice) or op.axis != 1 or len(rule.shape) < 3:
        return resolved
    if not all(isinstance(tensor.codec, plain.Plain) for tensor in resolved.sources.values()):
        return resolved
    shape = op.shape(rule.shape)
    sources = {
        coordinate: replace(
            tensor, shape=shape, parts=(replace(tensor.parts[0], shape=shape, within=(op.start, op.stop)),)
        )
        for coordinate, tensor in resolved.sources.items()
    }
    return ResolvedLeaf(replace(leaf, rule=replace(rule, shape=shape, ops=rule.ops[1:])), sources)


def _form(model: Model, checkpoint: Checkpoint) -> tuple[Sequence[Rule], Mapping[str, str]]:
    """The rules, and the spelling of prefixes, that fit a checkpoint best: for which most rules find their tensor."""
    forms = itertools.product((model.rules, *model.other_forms), ({}, *model.spellings))
    return max(forms, key=lambda form: sum(_fits(rule, form[1], checkpoint) for rule in form[0]) / len(form[0]))


def _fits(rule: Rule, spelling: Mapping[str, str], checkpoint: Checkpoint) -> bool:
    """Whether the first tensor of a rule is there, in its shape unless it is quantized."""
    patterns = _patterns(rule)
    if not patterns:
        return True
    layer = 0 if rule.layers is None else rule.layers.start
    name = _spelled(patterns[0].format(layer=layer, expert=0), spelling)
    tensor = checkpoint.tensors.get(name)
    if tensor is not None and tensor.dtype in FLOAT_DTYPES and isinstance(rule.source, str):
        return tensor.shape[1:] == rule.shape[1:]
    # Quantized weights have other names, of the same module.
    return (
        tensor is not None
        or any(f"{name}{suffix}" in checkpoint.tensors for suffix in ("_packed", "_blocks"))
        or (f"{_module(name)}.qweight" in checkpoint.tensors)
    )


def _spelled(name: str, spelling: Mapping[str, str]) -> str:
    """A name of the rules as the checkpoint spells it; the longest prefix counts."""
    for prefix in sorted(spelling, key=len, reverse=True):
        if name.startswith(prefix):
            return spelling[prefix] + name.removeprefix(prefix)
    return name


def _patterns(rule: Rule) -> list[str]:
    """The names of the tensors that a rule reads, with placeholders."""
    match rule.source:
        case Join(members):
            return [name for name, _ in members]
        case Constant():
            return []
        case name:
            return [name]


def _names(leaf: Leaf, coordinate: Shape) -> list[str]:
    return [leaf.source(name, coordinate) for name in _patterns(leaf.rule)]


def _find(
    leaf: Leaf,
    coordinate: Shape,
    checkpoint: Checkpoint,
    spelling: Mapping[str, str],
    quantization: QuantizationConfig | None,
) -> StoredTensor:
    """How the checkpoint stores the source tensor at a stack coordinate of a leaf."""
    rule = leaf.rule

    def find(name: str, shape: Shape) -> StoredTensor:
        name = _spelled(leaf.source(name, coordinate), spelling)
        tensor = checkpoint.tensors.get(name)
        if tensor is not None and tensor.dtype in plain.INTEGER_DTYPES and rule.dtype == "float32":
            return plain.stored(tensor, shape)
        return detect.find(name, shape, checkpoint.tensors, quantization)

    match rule.source:
        case Constant(value):
            return constant.stored(leaf.path, rule.shape, value)
        case Join(members, takes, groups):
            return joined.stored(leaf.path, rule.shape, [find(*member) for member in members], takes, groups)
        case name:
            if rule.stored_rows is None:
                return find(name, rule.shape)
            stored = find(name, (rule.stored_rows, *rule.shape[1:]))
            if not isinstance(stored.codec, plain.Plain):
                raise UnsupportedFormatError(
                    f"tensor '{stored.name}' is stored as {stored.codec.description}, with {rule.stored_rows} rows; "
                    f"MaxText has {rule.shape[0]}, and rows are added or left out only where values are plain numbers."
                )
            return replace(stored, shape=rule.shape)


def _module(name: str) -> str:
    """The module that a tensor belongs to: `a.b` of `a.b.weight`, `a.b.weight_scale` and `a.b.weight.absmax`."""
    module, weight, _ = name.partition(".weight")
    return module if weight else name.rpartition(".")[0]


def _leftovers(
    checkpoint: Checkpoint, model: Model, resolved: Sequence[ResolvedLeaf], used: set[str], failed: set[str]
) -> tuple[list[Ignored], list[SlicecastError]]:
    """What the rules left: ignored tensors by reason, and an error for each that no rule ignores.

    A weight that could not be used (its module is in `failed`) leaves its partners over; only the cause is reported.
    """
    originals = {
        item.leaf.rule.target: stored.parts[0].tensor
        for item in resolved
        for stored in item.sources.values()
        if stored.parts  # A constant has none.
    }
    counts: dict[str, Ignored] = {}
    unused: list[SlicecastError] = []
    for name, tensor in checkpoint.tensors.items():
        if name in used or _module(name) in failed:
            continue
        matching = [ignore for ignore in model.ignores if ignore.matches(name)]
        why = matching[0].why if matching else None
        if why is None and detect.is_runtime_only(name):
            why = detect.RUNTIME_ONLY_REASON
        if why is None:
            cause = "is a scale that no weight uses" if "scale" in name.rpartition(".")[2] else "is read by no rule"
            unused.append(
                UnusedTensorError(
                    f"{tensor.file}: tensor '{name}' ({tensor.dtype}{list(tensor.shape)}) {cause} of the family "
                    f"'{model.family}'. Either config.json does not belong to these weights, or the model has a part "
                    "that slicecast does not know. To leave it out, add --ignore_extra=REGEX."
                )
            )
        else:
            before = counts.get(why, Ignored(why, 0, 0))
            # Whoever leaves it out by --ignore_extra too has decided that it does not matter.
            matters = all(ignore.copy_of is not None for ignore in matching)
            targets = [ignore.copy_of for ignore in matching[:1] if matters]
            copies = tuple((tensor, originals[target]) for target in targets if target in originals)
            counts[why] = Ignored(why, before.count + 1, before.nbytes + tensor.nbytes, before.copies + copies)
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
