"""How families write rules down: a table, with what many rows have in common said once.

    table = RuleTable(sizes)
    table.add("model.norm.weight", "norm", "decoder/decoder_norm/scale")
    layer = table.within("model.layers.{layer}", "decoder/{layers}", layers)
    layer.add("mlp.up_proj.weight", "mlp embed -> embed mlp", "mlp/wi_1/kernel")

Each row says what the tensor is called, how its axes become the leaf's (`arrangement.py`), and what the leaf is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slicecast.convert.mapping import arrangement
from slicecast.convert.mapping.ops import Op
from slicecast.convert.mapping.rules import Constant, Join, Layers, Rule


@dataclass(frozen=True)
class RuleTable:
    """Rows of rules, under common prefixes.

    Attributes:
        sizes: The sizes of axes by name.
        source: The prefix of source names.
        target: The prefix of paths.
        layers: The layers of all rows.
        rules: The rules so far, of all tables that come from the same one.
    """

    sizes: Mapping[str, int]
    source: str = ""
    target: str = ""
    layers: Layers | None = None
    rules: list[Rule] = field(default_factory=list)

    def within(self, source: str, target: str, layers: Layers | None = None, **sizes: int) -> "RuleTable":
        """A table whose rows lie below these prefixes, with other layers and sizes where they are given."""
        return RuleTable(
            {**self.sizes, **sizes},
            _joined(".", self.source, source),
            _joined("/", self.target, target),
            layers or self.layers,
            self.rules,
        )

    def add(self, source: str, arranged: str, target: str, *ops: Op, **options: Any) -> None:
        """A row.

        Args:
            source: The tensor's name, below the table's prefix.
            arranged: How its axes become the leaf's.
            target: The leaf's path, below the table's prefix.
            ops: What happens after that.
            options: Further fields of the rule: `experts`, `dtype`, `scan_axis`.
        """
        self._add(_joined(".", self.source, source), arranged, target, ops, options)

    def add_constant(self, value: float, why: str, arranged: str, target: str, **options: Any) -> None:
        """A row for a leaf that no checkpoint has."""
        self._add(Constant(value, why), arranged, target, (), options)

    def add_join(
        self,
        members: Mapping[str, tuple[int, int]],
        takes: tuple[tuple[int, int, int], ...],
        groups: int,
        arranged: str,
        target: str,
        **options: Any,
    ) -> None:
        """A row whose source is made of several tensors, named below the table's prefix; see `Join`."""
        named = tuple((_joined(".", self.source, name), shape) for name, shape in members.items())
        self._add(Join(named, takes, groups), arranged, target, (), options)

    def _add(
        self, source: str | Join | Constant, arranged: str, target: str, ops: tuple[Op, ...], options: dict[str, Any]
    ) -> None:
        parsed = arrangement.parse(arranged, self.sizes)
        self.rules.append(
            Rule(
                source,
                parsed.shape,
                _joined("/", self.target, target),
                parsed.ops + ops,
                parsed.axes,
                self.layers,
                stored_rows=parsed.stored_rows,
                **options,
            )
        )


def _joined(separator: str, *names: str) -> str:
    return separator.join(name for name in names if name)
