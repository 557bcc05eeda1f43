"""The notation of axes: every form of it spelled out, against index arithmetic, and what is refused."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping import arrangement, ops
from slicecast.convert.mapping.arrangement import Arrangement
from slicecast.convert.mapping.ops import Slice, Split, Stride, Transpose
from slicecast.convert.verification import against_source

Array = np.ndarray[Any, Any]

SIZES = {"a": 2, "b": 3, "c": 5, "half": 4, "fewer": 1}

thorough = settings(max_examples=200, deadline=None, derandomize=True, database=None)
# Every new shape is compiled by XLA.
compiled = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def numbered(shape: Shape) -> Array:
    """An array without two equal elements."""
    return np.arange(np.prod(shape)).reshape(shape)


def laid_out(found: Arrangement) -> Array:
    """The leaf that the ops make, in NumPy, of a source without two equal elements."""
    target = ops.target_shape(found.ops, found.shape)
    box = ops.boxes(found.ops, Box.whole(target), found.shape)[0]
    return against_source.layout(found.ops, numbered(found.shape)[box.slices])


# ---- Every form, spelled out


@pytest.mark.parametrize(
    ("text", "shape", "made", "axes"),
    [
        ("a", (2,), (), ("a",)),
        ("a b", (2, 3), (), ("a", "b")),
        ("a b -> a b", (2, 3), (), ("a", "b")),
        ("  a   b->b a ", (2, 3), (Transpose(),), ("b", "a")),
        ("a b c -> c a b", (2, 3, 5), (Transpose((2, 0, 1)),), ("c", "a", "b")),
        # Sizes of other names, by number, and axes without a name.
        ("a:half b", (4, 3), (), ("a", "b")),
        ("a:7 b -> b a:7", (7, 3), (Transpose(),), ("b", "a")),
        (":half :7 -> :7 :half", (4, 7), (Transpose(),), (None, None)),
        ("a a:c -> a:c a", (2, 5), (Transpose(),), ("a", "a")),
        (":3 :03 -> :03 :3", (3, 3), (Transpose(),), (None, None)),
        # Groups: whole ones are moved first and then taken apart, so that kernels can transpose; others cannot be.
        ("(a b)", (6,), (Split(0, (2, 3)),), ("a", "b")),
        ("(a)", (2,), (), ("a",)),
        ("(a b) c -> c a b", (6, 5), (Transpose(), Split(1, (2, 3))), ("c", "a", "b")),
        ("c (a b) -> a b c", (5, 6), (Transpose(), Split(0, (2, 3))), ("a", "b", "c")),
        ("(a b) (c :7) -> c :7 a b", (6, 35), (Transpose(), Split(1, (2, 3)), Split(0, (5, 7))), ("c", None, "a", "b")),
        ("(a b) c -> a c b", (6, 5), (Split(0, (2, 3)), Transpose((0, 2, 1))), ("a", "c", "b")),
        ("(a b) -> b a", (6,), (Split(0, (2, 3)), Transpose((1, 0))), ("b", "a")),
        # Parts: blocks in front, every n-th element behind, any range.
        ("(0/2 a) c", (4, 5), (Slice(0, 0, 2),), ("a", "c")),
        ("(1/2 a) c -> c a", (4, 5), (Slice(0, 2, 4), Transpose()), ("c", "a")),
        ("c (2/3 a b) -> a b c", (5, 18), (Slice(1, 12, 18), Transpose(), Split(0, (2, 3))), ("a", "b", "c")),
        ("c (a 1/2)", (5, 4), (Stride(1, 1, 2),), ("c", "a")),
        ("(a b 0/4) -> a b", (24,), (Stride(0, 0, 4), Split(0, (2, 3))), ("a", "b")),
        ("(2:5/9 b) c", (9, 5), (Slice(0, 2, 5),), ("b", "c")),
        ("(3:9/9 a b)", (9,), (Slice(0, 3, 9), Split(0, (2, 3))), ("a", "b")),
        ("(1/2 a) (0/3 b) -> b a", (4, 9), (Slice(0, 2, 4), Slice(1, 0, 3), Transpose()), ("b", "a")),
    ],
)
def test_what_an_arrangement_says(text: str, shape: Shape, made: tuple[Any, ...], axes: tuple[str | None, ...]) -> None:
    assert arrangement.parse(text, SIZES) == Arrangement(shape, None, made, axes)


@pytest.mark.parametrize(
    ("text", "shape", "stored_rows"),
    [
        ("c~half b", (5, 3), 4),
        ("c~half b -> b c", (5, 3), 4),
        ("fewer~half b", (1, 3), 4),
        ("a:c~half", (5,), 4),
        ("c~11 b", (5, 3), 11),
        ("(c~half) b", (5, 3), 4),
        # As many rows as there are: nothing is added or left out.
        ("a:half~half b", (4, 3), None),
    ],
)
def test_rows_that_the_checkpoint_does_not_have(text: str, shape: Shape, stored_rows: int | None) -> None:
    found = arrangement.parse(text, SIZES)
    assert (found.shape, found.stored_rows) == (shape, stored_rows)
    assert "~" not in "".join(axis or "" for axis in found.axes)


@pytest.mark.parametrize(
    ("text", "leaf"),
    [
        ("a b -> b a", [[0, 3], [1, 4], [2, 5]]),
        ("(a b)", [[0, 1, 2], [3, 4, 5]]),
        ("(a b) -> b a", [[0, 3], [1, 4], [2, 5]]),
        ("(0/2 a)", [0, 1]),
        ("(1/2 a)", [2, 3]),
        ("(a 0/2)", [0, 2]),
        ("(a 1/2)", [1, 3]),
        ("(2:5/9 b)", [2, 3, 4]),
        ("a (1/2 b)", [[3, 4, 5], [9, 10, 11]]),
        ("(1/2 b) a -> a b", [[6, 8, 10], [7, 9, 11]]),
    ],
)
def test_where_the_elements_go(text: str, leaf: Any) -> None:
    assert laid_out(arrangement.parse(text, SIZES)).tolist() == leaf


# ---- Against index arithmetic


@dataclass(frozen=True)
class Group:
    """A stored axis: the axes that it holds by name and size, and which of its elements they are.

    Attributes:
        axes: The axes.
        before: What stands before them.
        after: What stands after them.
        length: How many elements are stored.
        first: The stored element that the first of the axes' elements is.
        step: How far the next one is.
    """

    axes: dict[str, int]
    before: str
    after: str
    length: int
    first: int
    step: int

    @property
    def text(self) -> str:
        """The group as it is written."""
        words = [word for word in (self.before, *self.axes, self.after) if word]
        return f"({' '.join(words)})" if len(words) > 1 else words[0]


@st.composite
def groups(draw: st.DrawFn, names: list[str]) -> Group:
    axes = {name: draw(st.integers(1, 4)) for name in names}
    count = int(np.prod(list(axes.values())))
    match draw(st.sampled_from(["all", "all", "block", "every", "range"])):
        case "block":
            parts = draw(st.integers(1, 3))
            index = draw(st.integers(0, parts - 1))
            return Group(axes, f"{index}/{parts}", "", parts * count, index * count, 1)
        case "every":
            step = draw(st.integers(1, 3))
            index = draw(st.integers(0, step - 1))
            return Group(axes, "", f"{index}/{step}", step * count, index, step)
        case "range":
            start, rest = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            length = start + count + rest
            return Group(axes, f"{start}:{start + count}/{length}", "", length, start, 1)
    return Group(axes, "", "", count, 0, 1)


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[list[Group], list[str]]:
    """Stored axes that hold one to four axes, and an order of these."""
    names = list("pqrs"[: draw(st.integers(1, 4))])
    source: list[Group] = []
    rest = names
    while rest:
        held = draw(st.integers(1, len(rest)))
        source.append(draw(groups(rest[:held])))
        rest = rest[held:]
    return source, draw(st.permutations(names))


def expected(source: list[Group], order: list[str]) -> Array:
    """The leaf, element by element, of a source without two equal elements."""
    sizes = {name: size for group in source for name, size in group.axes.items()}
    x = numbered(tuple(group.length for group in source))
    leaf = np.empty([sizes[name] for name in order], x.dtype)
    for index in itertools.product(*(range(sizes[name]) for name in order)):
        at = dict(zip(order, index, strict=True))
        origin = []
        for group in source:
            position = 0
            for name, size in group.axes.items():
                position = position * size + at[name]
            origin.append(group.first + group.step * position)
        leaf[index] = x[tuple(origin)]
    return leaf


def parsed(source: list[Group], order: list[str]) -> Arrangement:
    sizes = {name: size for group in source for name, size in group.axes.items()}
    return arrangement.parse(f"{' '.join(group.text for group in source)} -> {' '.join(order)}", sizes)


@thorough
@given(arrangements())
def test_the_ops_do_what_the_text_says(case: tuple[list[Group], list[str]]) -> None:
    source, order = case
    found = parsed(source, order)
    assert found.shape == tuple(group.length for group in source)
    assert found.axes == tuple(order)
    assert found.stored_rows is None
    wanted = expected(source, order)
    assert ops.target_shape(found.ops, found.shape) == wanted.shape
    np.testing.assert_array_equal(laid_out(found), wanted)


@compiled
@given(arrangements())
def test_the_chips_do_what_the_text_says(case: tuple[list[Group], list[str]]) -> None:
    found, wanted = parsed(*case), expected(*case)
    source, *steps = ops.boxes(found.ops, Box.whole(wanted.shape), found.shape)
    x = jnp.asarray(numbered(found.shape)[source.slices])
    np.testing.assert_array_equal(ops.apply(found.ops, x, [step.shape for step in steps]), wanted)


# ---- What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a missing", "there is no size called 'missing'; there are a, b, c, fewer, half"),
        ("a:missing b", "there is no size called 'missing'"),
        ("a~missing b", "there is no size called 'missing'"),
        ("a b -> b", r"the source's axes ['a', 'b'] are not the leaf's axes ['b']"),
        ("a -> a b", r"the source's axes ['a'] are not the leaf's axes ['a', 'b']"),
        ("a b -> a c", r"are not the leaf's axes ['a', 'c'], each once"),
        ("a a -> a a", "each once"),
        ("a a", "each once"),
        ("(a a) b", "each once"),
        ("a b -> a b b", "each once"),
        ("a b -> b a -> a b", "each once"),
        ("a b -> (a b)", "each once"),
        # An axis of another size is another axis, and has to be called the same on both sides.
        ("a:half b -> b a", r"the source's axes ['a:half', 'b'] are not the leaf's axes ['b', 'a']"),
        ("a b~half", "only the first axis can have another length in the checkpoint"),
        ("(a b~half) c", "only an axis that stands alone can have another length in the checkpoint"),
        ("(0/2 a~half)", "only an axis that stands alone can have another length in the checkpoint"),
        ("3 a", "'3' is no axis"),
        ("A b", "'A' is no axis"),
        ("a: b", "'a:' is no axis"),
        ("~half b", "'~half' is no axis"),
        ("0/2 a", "holds no axis"),
        ("(0/2) a", "'(0/2)' holds no axis"),
        ("() a", "'()' is no axis"),
        ("(a 0/2 b)", "'0/2' is no axis"),
        ("(0/2 a 1/2)", "'1/2' is no axis"),
        ("(b 2:5/9)", "'2:5/9' is no axis"),
        ("(a b", "parentheses do not match"),
        ("a b) c", "parentheses do not match"),
        ("((a b) c)", "parentheses do not match"),
        ("(2/2 a)", "axis 0 of [4] has no range 4:6"),
        ("(a 2/2)", "axis 0 of [4] has no element 2 in periods of 2"),
        ("(0/0 a)", "has no range"),
        ("(a 0/0)", "has no element 0 in periods of 0"),
        ("(2:4/9 b)", "'(2:4/9 b)': the axes have 3 elements, and 2 are taken"),
        ("(2:5/4 b)", "axis 0 of [4] has no range 2:5"),
        ("", "the source's axes [] are not"),
        (" -> ", "the source's axes [] are not"),
    ],
)
def test_what_is_no_arrangement(text: str, words: str) -> None:
    """The rules are written by people: a slip of the pen is refused, with the text in which it stands."""
    with pytest.raises(ValueError) as caught:
        arrangement.parse(text, SIZES)
    message = str(caught.value)
    assert message.startswith(f"arrangement '{text}': ")
    assert words in message
