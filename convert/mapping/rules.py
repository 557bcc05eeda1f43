"""Rules: what a model family's tensors are called, where they go, and how they change on the way.

A rule is written once per kind of tensor, with placeholders for its named axes:

    Rule("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", (intermediate, hidden),
         "decoder/{moe_layers}/MoeBlock_0/wi_0", (Transpose(),), ("embed_moe", "mlp_moe"), (moe_layers, experts))

`{layer}` and `{expert}` run over the rule's `stacks`. Whether a stack is an axis of the target leaf (scanned) or part
of its path (unscanned), and at which position the axis stands, belongs to the target layout (`target.py`), not to the
rule: one table serves both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slicecast.convert.box import Shape
from slicecast.convert.mapping.ops import Op


@dataclass(frozen=True, slots=True)
class Stack:
    """A named axis over which equal tensors are stacked.

    Where layers of several kinds take turns, MaxText scans over their cycle: the layers of each kind are a stack of
    their own, in which source indices advance by the length of the cycle.

    Attributes:
        placeholder: Its name in source patterns, for example `layer`.
        axis: MaxText's logical name of the stacked axis, for example `moe_layers`; also its placeholder in target
            paths.
        start: The source index of the stack's first tensor.
        size: How many tensors the stack holds.
        always: True if the axis is stacked in unscanned checkpoints too, and leads the leaf (experts).
        step: The distance between the source indices of neighbors: the length of the cycle.
        block: For a kind of layer in a cycle, its path in scanned trees, for example `layers/layers_1`.
    """

    placeholder: str
    axis: str
    start: int
    size: int
    always: bool = False
    step: int = 1
    block: str | None = None

    def source_index(self, index: int) -> int:
        """The source index of the tensor at `index` of the stack."""
        return self.start + self.step * index

    @property
    def scanned_path(self) -> str:
        """What stands for the stack in target paths where it is an axis of the leaf."""
        return self.block or self.axis

    def unscanned_path(self, index: int) -> str:
        """What stands for it where each tensor has its own leaf; layers of a cycle keep the numbers of the source."""
        return f"{self.axis}_{self.source_index(index) if self.block else index}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of source tensor, and the leaf or leaves it becomes.

    Attributes:
        source: The name of the tensor with a placeholder for each stack.
        shape: The shape that `config.json` gives the tensor.
        target: The path of the leaf below `params/params`, with a placeholder for each stack that scanning stacks.
        ops: What happens to each tensor on the way, first to last.
        axes: MaxText's logical names of the target's axes, for one tensor: without the stacked ones.
        stacks: The named axes over which the pattern runs.
        dtype: The dtype on disk if it is not the one of `--save_dtype`.
        scan_axis: The position of the layer axis if it is not the one of `--param_scan_axis`.
    """

    source: str
    shape: Shape
    target: str
    ops: tuple[Op, ...] = ()
    axes: tuple[str | None, ...] = ()
    stacks: tuple[Stack, ...] = ()
    dtype: str | None = None
    scan_axis: int | None = None


@dataclass(frozen=True, slots=True)
class Ignore:
    """Source tensors that are left out on purpose.

    Attributes:
        pattern: A regular expression that the whole name matches.
        why: The reason, printed by `plan` and `convert`.
    """

    pattern: str
    why: str

    def matches(self, name: str) -> bool:
        """Whether this tensor is left out."""
        return re.fullmatch(self.pattern, name) is not None


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint's model as its `config.json` describes it.

    Attributes:
        family: The name of the family whose rules apply.
        description: One line for people: the architecture and its sizes.
        rules: How each kind of tensor converts.
        ignores: Which tensors are left out, and why.
        notes: Decisions that the config alone did not settle, for the plan to print.
    """

    family: str
    description: str
    rules: Sequence[Rule]
    ignores: Sequence[Ignore] = ()
    notes: Sequence[str] = ()
