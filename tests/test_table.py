"""Tables of rules, and the leaves that rules become: paths, shapes, axes, and which tensor stands where."""

from typing import Any

import pytest

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping.ops import Scale, Split, Transpose
from slicecast.convert.mapping.rules import Constant, Join, LayerAxis, Layers, Rule, cycle, stacked
from slicecast.convert.mapping.table import RuleTable
from slicecast.convert.mapping.target import FP8, Layout, Leaf, Stack, leaves

SCANNED, UNSCANNED = Layout(scan_layers=True), Layout(scan_layers=False)


# ---- Tables


def test_a_row_is_a_rule() -> None:
    table = RuleTable({"mlp": 5, "embed": 3})
    table.add("norm.weight", "embed", "decoder/norm/scale")
    table.add("up.weight", "mlp embed -> embed mlp", "up/kernel", Scale(2.0), dtype="float32", scan_axis=0)
    table.add("embedding", "mlp~4 embed", "embedding")
    assert table.rules == [
        Rule("norm.weight", (3,), "decoder/norm/scale", (), ("embed",)),
        Rule(
            "up.weight", (5, 3), "up/kernel", (Transpose(), Scale(2.0)), ("embed", "mlp"), dtype="float32", scan_axis=0
        ),
        Rule("embedding", (5, 3), "embedding", (), ("mlp", "embed"), stored_rows=4),
    ]


def test_rows_below_prefixes() -> None:
    """A table below another adds to the same rules, with its sizes, and with its layers unless it has others."""
    table = RuleTable({"embed": 3, "mlp": 5})
    layers, others = stacked("layers", 2), stacked("moe_layers", 4, start=2)
    layer = table.within("model.layers.{layer}", "decoder/{layers}", layers)
    mlp = layer.within("mlp", "", mlp=7)
    mlp.add("up.weight", "mlp embed", "wi")
    layer.within("", "post").add("norm.weight", "embed", "scale")
    layer.within("moe", "moe", others).add("gate", "mlp", "gate")
    layer.add("norm.weight", "mlp", "scale")
    table.add("norm.weight", "embed", "scale")
    assert table.rules == [
        Rule("model.layers.{layer}.mlp.up.weight", (7, 3), "decoder/{layers}/wi", (), ("mlp", "embed"), layers),
        Rule("model.layers.{layer}.norm.weight", (3,), "decoder/{layers}/post/scale", (), ("embed",), layers),
        Rule("model.layers.{layer}.moe.gate", (5,), "decoder/{layers}/moe/gate", (), ("mlp",), others),
        Rule("model.layers.{layer}.norm.weight", (5,), "decoder/{layers}/scale", (), ("mlp",), layers),
        Rule("norm.weight", (3,), "scale", (), ("embed",)),
    ]
    assert table.sizes == {"embed": 3, "mlp": 5}


def test_rows_without_one_tensor() -> None:
    """What the members of a join are called is below the prefix too; a constant has no name."""
    table = RuleTable({"a": 5, "b": 3}).within("m", "t")
    takes = ((0, 0, 2), (1, 0, 3))
    table.add_join({"q.weight": (2, 3), "k.weight": (4, 3)}, takes, 1, "a b -> b a", "qk")
    table.add_constant(1.0, "it multiplies with nothing", "a", "scale", dtype="float32")
    members = (("m.q.weight", (2, 3)), ("m.k.weight", (4, 3)))
    assert table.rules == [
        Rule(Join(members, takes, 1), (5, 3), "t/qk", (Transpose(),), ("b", "a")),
        Rule(Constant(1.0, "it multiplies with nothing"), (5,), "t/scale", (), ("a",), dtype="float32"),
    ]


def test_a_slip_names_the_row() -> None:
    table = RuleTable({"a": 5})
    with pytest.raises(ValueError, match=r"arrangement 'a c': there is no size called 'c'; there are a"):
        table.add("x", "a c", "y")
    assert table.rules == []


# ---- Layers


def test_layers_that_follow_each_other() -> None:
    assert stacked("dense_layers", 3) == Layers(
        0, (LayerAxis("dense_layers", 3),), "dense_layers", "dense_layers_{index}"
    )
    assert stacked("moe_layers", 4, start=3).start == 3


def test_layers_in_cycles() -> None:
    repeats = LayerAxis("layers", 3, 2)
    assert cycle(6, 2, "layers/layers_{}") == [
        Layers(0, (repeats,), "layers/layers_0"),
        Layers(1, (repeats,), "layers/layers_1"),
    ]
    repeats = LayerAxis("blocks", 2, 3)
    assert [layers.start for layers in cycle(6, 3, "{}", axis="blocks", start=5)] == [5, 6, 7]
    assert all(layers.axes == (repeats,) for layers in cycle(6, 3, "{}", axis="blocks", start=5))


# ---- Leaves


def names(leaf: Leaf) -> list[str]:
    """The source names at all coordinates, in their order."""
    assert isinstance(leaf.rule.source, str)
    return [leaf.source(leaf.rule.source, coordinate) for coordinate in leaf.coordinates(Box.whole(leaf.shape))]


def described(rule: Rule, layout: Layout) -> list[tuple[str, Shape, tuple[str | None, ...], list[str]]]:
    """The path, shape, axes and sources of each leaf."""
    return [
        (leaf.path.removeprefix("params/params/"), leaf.shape, leaf.axes, names(leaf)) for leaf in leaves(rule, layout)
    ]


def matrix(layers: Layers | None, source: str = "m.{layer}.up", **options: Any) -> Rule:
    """A rule for a matrix `[5, 3]` that becomes `[3, 5]`."""
    return Rule(source, (5, 3), "d/{layers}/up", (Transpose(),), ("embed", "mlp"), layers, **options)


def test_a_tensor_outside_of_layers() -> None:
    rule = Rule("embed.weight", (7, 3), "token_embedder/embedding", (), ("vocab", "embed"))
    for layout in (SCANNED, UNSCANNED):
        assert described(rule, layout) == [
            ("token_embedder/embedding", (7, 3), ("vocab", "embed"), ["embed.weight"]),
        ]
        (leaf,) = leaves(rule, layout)
        assert (leaf.layer, leaf.stacked) == (None, ())
        assert leaf.name == "params.params.token_embedder.embedding"


@pytest.mark.parametrize(
    ("scan_axis", "shape", "axes"),
    [
        (0, (2, 3, 5), ("moe_layers", "embed", "mlp")),
        (1, (3, 2, 5), ("embed", "moe_layers", "mlp")),
        (2, (3, 5, 2), ("embed", "mlp", "moe_layers")),
        # A leaf of lower rank has them at its end.
        (3, (3, 5, 2), ("embed", "mlp", "moe_layers")),
    ],
)
def test_a_stack(scan_axis: int, shape: Shape, axes: tuple[str, ...]) -> None:
    """Also where the rule itself says where the layers stand, whatever the user says."""
    layers = stacked("moe_layers", 2, start=3)
    expected = [("d/moe_layers/up", shape, axes, ["m.3.up", "m.4.up"])]
    assert described(matrix(layers), Layout(True, scan_axis)) == expected
    assert described(matrix(layers, scan_axis=scan_axis), Layout(True, 1)) == expected
    assert described(matrix(layers, scan_axis=scan_axis), Layout(True, 0)) == expected
    assert described(matrix(layers, scan_axis=scan_axis), UNSCANNED) == [
        ("d/moe_layers_0/up", (3, 5), ("embed", "mlp"), ["m.3.up"]),
        ("d/moe_layers_1/up", (3, 5), ("embed", "mlp"), ["m.4.up"]),
    ]


@pytest.mark.parametrize(
    ("scan_axis", "shape", "axes"), [(0, (2, 3), ("layers", "norm")), (1, (3, 2), ("norm", "layers"))]
)
def test_a_stack_of_vectors(scan_axis: int, shape: Shape, axes: tuple[str, ...]) -> None:
    rule = Rule("m.{layer}.norm", (3,), "{layers}/scale", (), ("norm",), stacked("layers", 2))
    assert described(rule, Layout(True, scan_axis)) == [("layers/scale", shape, axes, ["m.0.norm", "m.1.norm"])]


@pytest.mark.parametrize(
    ("scan_axis", "shape", "axes", "layer_first"),
    [
        (0, (2, 4, 3, 5), ("layers", "exp", "embed", "mlp"), True),
        (1, (4, 2, 3, 5), ("exp", "layers", "embed", "mlp"), False),
        (2, (4, 3, 2, 5), ("exp", "embed", "layers", "mlp"), False),
        (3, (4, 3, 5, 2), ("exp", "embed", "mlp", "layers"), False),
    ],
)
def test_experts(scan_axis: int, shape: Shape, axes: tuple[str, ...], layer_first: bool) -> None:
    """Experts lead, but for layers that lead everything; they are stacked in unscanned trees too."""
    rule = matrix(stacked("layers", 2), "m.{layer}.e.{expert}.up", experts=4)
    order = [(layer, expert) for layer in range(2) for expert in range(4)]
    if not layer_first:
        order.sort(key=lambda pair: pair[1])
    sources = [f"m.{layer}.e.{expert}.up" for layer, expert in order]
    assert described(rule, Layout(True, scan_axis)) == [("d/layers/up", shape, axes, sources)]
    for layout in (UNSCANNED, Layout(False, scan_axis)):
        assert described(rule, layout) == [
            (
                f"d/layers_{layer}/up",
                (4, 3, 5),
                ("exp", "embed", "mlp"),
                [f"m.{layer}.e.{expert}.up" for expert in range(4)],
            )
            for layer in range(2)
        ]


def test_experts_outside_of_layers() -> None:
    rule = matrix(None, "e.{expert}.up", experts=2)
    for layout in (SCANNED, UNSCANNED, Layout(True, 0)):
        (leaf,) = leaves(rule, layout)
        assert (leaf.shape, leaf.axes, names(leaf)) == ((2, 3, 5), ("exp", "embed", "mlp"), ["e.0.up", "e.1.up"])


def test_a_cycle() -> None:
    """Unscanned, layers are called by their numbers, whatever their place in the cycle."""
    first, second = cycle(6, 2, "blocks/layers_{}", start=1)
    assert described(matrix(second), SCANNED) == [
        ("d/blocks/layers_1/up", (3, 3, 5), ("embed", "layers", "mlp"), ["m.2.up", "m.4.up", "m.6.up"])
    ]
    assert described(matrix(first), SCANNED)[0][3] == ["m.1.up", "m.3.up", "m.5.up"]
    assert [(path, sources) for path, _, _, sources in described(matrix(second), UNSCANNED)] == [
        ("d/layers_2/up", ["m.2.up"]),
        ("d/layers_4/up", ["m.4.up"]),
        ("d/layers_6/up", ["m.6.up"]),
    ]


NESTED = Layers(1, (LayerAxis("blocks", 2, 4), LayerAxis("local_layers", 3)), "blocks/local_layers")


@pytest.mark.parametrize(
    ("scan_axis", "shape", "axes"),
    [
        (0, (2, 3, 3, 5), ("blocks", "local_layers", "embed", "mlp")),
        (1, (3, 2, 3, 5), ("embed", "blocks", "local_layers", "mlp")),
        (2, (3, 5, 2, 3), ("embed", "mlp", "blocks", "local_layers")),
        (5, (3, 5, 2, 3), ("embed", "mlp", "blocks", "local_layers")),
    ],
)
def test_a_stack_in_a_stack(scan_axis: int, shape: Shape, axes: tuple[str, ...]) -> None:
    """Three layers of each cycle of four, of which there are two; the fourth one is of another kind."""
    assert described(matrix(NESTED), Layout(True, scan_axis)) == [
        ("d/blocks/local_layers/up", shape, axes, ["m.1.up", "m.2.up", "m.3.up", "m.5.up", "m.6.up", "m.7.up"])
    ]


def test_a_stack_in_a_stack_unscanned() -> None:
    assert [(path, sources) for path, _, _, sources in described(matrix(NESTED), UNSCANNED)] == [
        (f"d/layers_{layer}/up", [f"m.{layer}.up"]) for layer in (1, 2, 3, 5, 6, 7)
    ]


@pytest.mark.parametrize(
    ("scan_axis", "shape", "stacks"),
    [
        (0, (2, 3, 2, 3, 5), "layer layer expert"),
        (1, (2, 2, 3, 3, 5), "expert layer layer"),
        (2, (2, 3, 2, 3, 5), "expert layer layer"),
    ],
)
def test_experts_of_a_stack_in_a_stack(scan_axis: int, shape: Shape, stacks: str) -> None:
    (leaf,) = leaves(matrix(NESTED, "m.{layer}.e.{expert}.up", experts=2), Layout(True, scan_axis))
    assert leaf.shape == shape
    assert [stack.placeholder for _, stack in leaf.stacked] == stacks.split()
    for coordinate in leaf.coordinates(Box.whole(leaf.shape)):
        at = {axis: index for (axis, _), index in zip(leaf.stacked, coordinate, strict=True)}
        named = {leaf.axes[axis]: index for axis, index in at.items()}
        layer = 1 + 4 * named["blocks"] + named["local_layers"]
        assert leaf.source("m.{layer}.e.{expert}.up", coordinate) == f"m.{layer}.e.{named['exp']}.up"


def test_layers_that_stand_alone() -> None:
    """A layer that is scanned over in no tree has one leaf of its own, called as it likes."""
    rule = matrix(Layers(4, (), "remainder/layers_0"))
    assert described(rule, SCANNED) == [("d/remainder/layers_0/up", (3, 5), ("embed", "mlp"), ["m.4.up"])]
    assert described(rule, UNSCANNED) == [("d/layers_4/up", (3, 5), ("embed", "mlp"), ["m.4.up"])]


def test_one_layer_of_a_kind_is_a_stack_of_one() -> None:
    rule = matrix(stacked("dense_layers", 1))
    assert described(rule, SCANNED) == [
        ("d/dense_layers/up", (3, 1, 5), ("embed", "dense_layers", "mlp"), ["m.0.up"]),
    ]


@pytest.mark.parametrize(
    ("dtype", "save_dtype", "expected"),
    [
        (None, "bfloat16", "bfloat16"),
        (None, "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        # Weights that are not FP8 in the checkpoint are no FP8 in the result.
        (None, FP8, "bfloat16"),
        ("float32", FP8, "float32"),
    ],
)
def test_dtypes(dtype: str | None, save_dtype: str, expected: str) -> None:
    (leaf,) = leaves(matrix(stacked("layers", 2), dtype=dtype), Layout(True, save_dtype=save_dtype))
    assert leaf.dtype == expected


def test_where_a_tensor_lies_in_a_box() -> None:
    """Six heads of a matrix, two layers, three experts: a box of the leaf holds parts of some tensors."""
    layers = Layers(0, (LayerAxis("layers", 2, 3), LayerAxis("local", 3)), "layers")
    rule = Rule(
        "m.{layer}.{expert}", (12, 5), "t", (Transpose(), Split(1, (6, 2))), ("in", "head", "dim"), layers, experts=4
    )
    (leaf,) = leaves(rule, SCANNED)
    assert leaf.shape == (4, 2, 3, 5, 6, 2)
    assert leaf.element_shape == (5, 6, 2)
    assert leaf.stacked == (
        (0, Stack("expert", "exp", 4)),
        (1, Stack("layer", "layers", 2, 3)),
        (2, Stack("layer", "local", 3)),
    )
    assert [leaf.element_axis(axis) for axis in range(3)] == [3, 4, 5]
    box = Box((1, 1, 0, 0, 2, 0), (3, 2, 2, 5, 4, 2))
    assert leaf.element_box(box) == Box((0, 2, 0), (5, 4, 2))
    assert list(leaf.coordinates(box)) == [(1, 1, 0), (1, 1, 1), (2, 1, 0), (2, 1, 1)]
    assert leaf.element_index(box, (2, 1, 1))[:3] == (1, 0, 1)
    assert [leaf.source("m.{layer}.{expert}", at) for at in leaf.coordinates(box)] == [
        "m.3.1",
        "m.4.1",
        "m.3.2",
        "m.4.2",
    ]
