"""The layout operations against index arithmetic: on whole arrays, on boxes, backwards, and where they refuse."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from slicecast.convert.box import Box, Shape
from slicecast.convert.mapping import ops
from slicecast.convert.mapping.ops import (
    DeinterleaveHalves,
    InterleaveHalves,
    Merge,
    Offset,
    Op,
    Scale,
    Slice,
    Split,
    Stride,
    Transpose,
)
from slicecast.convert.mapping.rules import ModelOptions

Array = npt.NDArray[Any]
Case = tuple[tuple[Op, ...], Shape]

thorough = settings(max_examples=120, deadline=None, derandomize=True, database=None)
# Every new shape is compiled by XLA.
compiled = settings(max_examples=25, deadline=None, derandomize=True, database=None)

PERMUTES_LAST_AXIS = (InterleaveHalves, DeinterleaveHalves)


# ---- The oracle


def source_index(op: Op, index: Shape, source: Shape) -> Shape:
    """Which element of the source an op puts at `index`."""
    match op:
        case Transpose(order):
            origin = dict(zip(order, index, strict=True))
            return tuple(origin[axis] for axis in range(len(source)))
        case Slice(axis, start, _):
            return (*index[:axis], start + index[axis], *index[axis + 1 :])
        case Split(axis, sizes):
            position = 0
            for digit, size in zip(index[axis : axis + len(sizes)], sizes, strict=True):
                position = position * size + digit
            return (*index[:axis], position, *index[axis + len(sizes) :])
        case Merge(axis, count):
            digits: list[int] = []
            position = index[axis]
            for size in reversed(source[axis : axis + count]):
                position, digit = divmod(position, size)
                digits.insert(0, digit)
            return (*index[:axis], *digits, *index[axis + 1 :])
        case Stride(axis, start, step):
            return (*index[:axis], start + step * index[axis], *index[axis + 1 :])
        case InterleaveHalves():
            pair, second = divmod(index[-1], 2)
            return (*index[:-1], pair + second * (source[-1] // 2))
        case DeinterleaveHalves():
            second, pair = divmod(index[-1], source[-1] // 2)
            return (*index[:-1], 2 * pair + second)
        case Scale() | Offset():
            return index
    raise TypeError(op)


def needed(chain: Sequence[Op], box: Box, source: Shape) -> list[Shape]:
    """The source elements that the elements of a target box come from, in the order of the box."""
    return _backwards(chain, box, source, lambda op, index, shape: [source_index(op, index, shape)])


def read(chain: Sequence[Op], box: Box, source: Shape) -> list[Shape]:
    """The source elements that are read for a target box: those needed, and what is read with them.

    That is the rest of each period of a stride, and of each axis but the first of which a range is taken.
    """

    def with_others(op: Op, index: Shape, shape: Shape) -> list[Shape]:
        match op:
            case Stride(axis, _, step):
                return [source_index(Stride(axis, start, step), index, shape) for start in range(step)]
            case Slice(axis, start, stop) if axis > 0:
                # The elements left out come with the first of those that are taken.
                own = [source_index(op, index, shape)]
                left_out = [i for i in range(shape[axis]) if not start <= i < stop] if index[axis] == 0 else []
                return own + [(*index[:axis], i, *index[axis + 1 :]) for i in left_out]
        return [source_index(op, index, shape)]

    return _backwards(chain, box, source, with_others)


def _backwards(
    chain: Sequence[Op], box: Box, source: Shape, step: Callable[[Op, Shape, Shape], list[Shape]]
) -> list[Shape]:
    shapes = [source]
    for op in chain:
        shapes.append(op.shape(shapes[-1]))
    found = list(itertools.product(*(range(low, high) for low, high in zip(box.start, box.stop, strict=True))))
    for op, shape in zip(reversed(chain), reversed(shapes[:-1]), strict=True):
        found = [origin for index in found for origin in step(op, index, shape)]
    return found


def expected(chain: Sequence[Op], x: Array, box: Box) -> Array:
    """The target box of a chain, element by element; sums and products are float32, in the order of the chain."""
    values = np.array([x[index] for index in needed(chain, box, x.shape)], x.dtype).reshape(box.shape)
    for op in chain:
        if isinstance(op, Scale):
            values = values.astype(np.float32) * np.float32(op.factor)
        if isinstance(op, Offset):
            values = values.astype(np.float32) + np.float32(op.term)
    return values


def bounds(points: Sequence[Shape]) -> Box:
    """The smallest box around some elements."""
    table = np.array(points)
    return Box(tuple(map(int, table.min(0))), tuple(map(int, table.max(0) + 1)))


def assert_same_bits(found: Any, wanted: Array) -> None:
    array = np.asarray(found)
    assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
    assert array.tobytes() == np.ascontiguousarray(wanted).tobytes()


def numbered(shape: Shape) -> Array:
    """An array without two equal elements."""
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


# ---- Cases


@st.composite
def shapes(draw: st.DrawFn, min_rank: int = 1, max_rank: int = 3) -> list[int]:
    return draw(st.lists(st.integers(1, 5), min_size=min_rank, max_size=max_rank))


@st.composite
def splits(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape[axis] = int(np.prod(sizes))
    return (Split(axis, sizes),), tuple(shape)


@st.composite
def merges(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(0, len(shape) - 1))
    return (Merge(axis, draw(st.integers(1, len(shape) - axis))),), tuple(shape)


@st.composite
def permutations(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    shape[-1] = 2 * draw(st.integers(1, 4))
    either: list[Op] = [InterleaveHalves(), DeinterleaveHalves()]
    op = draw(st.sampled_from(either))
    return (op,), tuple(shape)


@st.composite
def transposes(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4))
    return (Transpose(tuple(draw(st.permutations(range(len(shape)))))),), tuple(shape)


@st.composite
def slices(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    return (Slice(axis, start, draw(st.integers(start + 1, shape[axis]))),), tuple(shape)


@st.composite
def strides(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    axis = draw(st.integers(0, len(shape) - 1))
    step = draw(st.integers(1, 4))
    shape[axis] *= step
    return (Stride(axis, draw(st.integers(0, step - 1)), step),), tuple(shape)


@st.composite
def chains(draw: st.DrawFn, partial: bool = False) -> Case:
    """Up to four ops that fit one another, and do not round; with `partial`, some that leave elements out."""
    source = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=2)))
    shape, chain = source, list[Op]()
    for _ in range(draw(st.integers(1, 4))):
        options: list[Op] = [Scale(0.25), Offset(1.0)]
        if partial:
            options += [Stride(a, start, 2) for a, size in enumerate(shape) if size % 2 == 0 for start in (0, 1)]
            options += [Slice(a, start, start + 2) for a, size in enumerate(shape) for start in range(size - 1)]
        if len(shape) > 1:
            options += [Transpose(draw(st.permutations(range(len(shape))).map(tuple))) for _ in range(2)]
        if shape[-1] % 2 == 0:
            options += [InterleaveHalves(), DeinterleaveHalves()]
        for axis, size in enumerate(shape):
            options += [Split(axis, (n, size // n)) for n in range(1, size + 1) if size % n == 0]
        options += [Merge(axis, 2) for axis in range(len(shape) - 1)]
        chain.append(draw(st.sampled_from(options)))
        shape = chain[-1].shape(shape)
    return tuple(chain), source


@st.composite
def with_box(draw: st.DrawFn, cases: st.SearchStrategy[Case]) -> tuple[tuple[Op, ...], Shape, Box]:
    """A case and a box of its target; half of the axes are whole, or boxes would hardly ever be possible."""
    chain, source = draw(cases)
    ranges = []
    for size in ops.target_shape(chain, source):
        low = 0 if draw(st.booleans()) else draw(st.integers(0, size - 1))
        ranges.append((low, size if draw(st.booleans()) else draw(st.integers(low + 1, size))))
    return chain, source, Box(tuple(low for low, _ in ranges), tuple(high for _, high in ranges))


def family_chains() -> dict[str, Case]:
    """Every chain of ops in the families' rules, once, with the sizes of a tiny model."""
    models = [tiny_models.model(name) for name in tiny_models.CONFIGS]
    models.append(tiny_models.model("llama", ModelOptions(rope_type="llama3.1")))
    found: dict[str, Case] = {}
    for rule in (rule for model in models for rule in model.rules):
        found.setdefault(f"{len(rule.shape)}d {kind(rule.ops)}".strip(), (rule.ops, rule.shape))
    return found


def kind(chain: Sequence[Op]) -> str:
    """What a chain does, without sizes."""
    words = []
    for op in chain:
        match op:
            case Transpose(order):
                words.append("Transpose" + "".join(map(str, order)))
            case Slice(axis) | Stride(axis) | Split(axis):
                words.append(f"{type(op).__name__}{axis}")
            case _:
                words.append(type(op).__name__)
    return " ".join(words)


# ---- Whole arrays and boxes


def test_the_families_use_the_chains_that_are_tested_here() -> None:
    assert set(family_chains()) == {
        "1d",
        "1d Offset",
        "1d Slice0",
        "1d Slice0 Split0",
        "1d Split0",
        "2d",
        "2d Scale",
        "2d Slice0 Transpose10",
        "2d Slice0 Transpose10 Split1",
        "2d Split0 Transpose021",
        "2d Stride1",
        "2d Transpose10",
        "2d Transpose10 Split0",
        "2d Transpose10 Split1",
        "2d Transpose10 Split1 InterleaveHalves",
        "2d Transpose10 Split1 InterleaveHalves Scale",
        "2d Transpose10 Split1 Scale",
        "3d",
        "3d Slice1 Transpose021",
        "3d Slice2",
        "3d Stride2",
        "3d Transpose021",
        "3d Transpose210",
        "4d Transpose2310",
        "5d Transpose23410",
    }


def check_box(chain: Sequence[Op], source: Shape, box: Box) -> None:
    """A box of the target is what the same box of the whole target is; raises `ValueError` where boxes are refused."""
    chain_boxes = ops.boxes(chain, box, source)
    assert len(chain_boxes) == len(chain) + 1
    assert chain_boxes[-1] == box
    points = read(chain, box, source)
    assert chain_boxes[0] == bounds(points)
    assert chain_boxes[0].size == len(set(points)) == len(points)
    x = numbered(source)
    found = ops.apply(chain, jnp.asarray(x[chain_boxes[0].slices]), [step.shape for step in chain_boxes[1:]])
    assert_same_bits(found, expected(chain, x, box))


@compiled
@given(
    with_box(
        st.one_of(transposes(), slices(), splits(), merges(), strides(), permutations(), chains(), chains(partial=True))
    )
)
def test_a_box_is_the_same_box_of_the_whole(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    chain, source, box = case
    taken, *steps = ops.boxes(chain, Box.whole(ops.target_shape(chain, source)), source)
    x = numbered(source)
    whole = ops.apply(chain, jnp.asarray(x[taken.slices]), [step.shape for step in steps])
    assert_same_bits(whole, expected(chain, x, steps[-1] if steps else taken))
    try:
        check_box(chain, source, box)
    except ValueError:
        return  # Where it is refused, and whether rightly, is tested below.


@pytest.mark.parametrize("name", family_chains())
def test_every_box_along_every_axis_of_the_families_chains(name: str) -> None:
    """Cuts along each axis; refused only if what is needed is no box, or if the axis is permuted or partly taken."""
    chain, source = family_chains()[name]
    target = ops.target_shape(chain, source)
    all_rows = ops.boxes(chain, Box.whole(target), source)[0].shape[0]
    follow_rows = set()
    for axis, size in enumerate(target):
        for low, high in itertools.combinations(sorted({0, 1, size // 2, size}), 2):
            box = Box.whole(target).with_axis(axis, low, high)
            try:
                rows = ops.boxes(chain, box, source)[0].shape[0]
            except ValueError:
                permuted = axis == len(target) - 1 and any(isinstance(op, PERMUTES_LAST_AXIS) for op in chain)
                points = needed(chain, box, source)
                taken = [(op.axis, op.stop - op.start) for op in chain if isinstance(op, Slice) and op.axis > 0]
                cut = any(bounds(points).shape[axis] < length for axis, length in taken)
                assert permuted or cut or bounds(points).size != len(points)
            else:
                check_box(chain, source, box)
                if rows < all_rows:
                    follow_rows.add(axis)
    # One axis follows the source's rows: it is what lets a tensor be converted in parts.
    assert len(follow_rows) == 1


@thorough
@given(with_box(st.one_of(transposes(), splits())))
def test_boxes_are_refused_only_where_there_are_none(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    chain, source, box = case
    points = needed(chain, box, source)
    try:
        found = ops.boxes(chain, box, source)[0]
    except ValueError:
        assert bounds(points).size != len(points)
    else:
        assert found == bounds(points)
        assert found.size == len(points)


@thorough
@given(with_box(merges()))
def test_merges_are_refused_only_where_there_is_no_box(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    """The contract of `Op.source_box`: "`ValueError` where that is no box"."""
    chain, source, box = case
    points = needed(chain, box, source)
    is_box = bounds(points).size == len(points)
    try:
        found = ops.boxes(chain, box, source)[0]
    except ValueError:
        assert not is_box
    else:
        assert is_box
        assert found == bounds(points)


@thorough
@given(with_box(strides()))
def test_strides_read_whole_periods(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    """No box is refused; that of a whole axis is the whole axis, so that what was one run of bytes stays one."""
    chain, source, box = case
    assert ops.boxes(chain, box, source)[0] == bounds(read(chain, box, source))
    assert ops.boxes(chain, Box.whole(ops.target_shape(chain, source)), source)[0] == Box.whole(source)


@compiled
@given(strides())
def test_strides_take_a_tensor_apart(case: Case) -> None:
    """All starts of a step together hold each element once."""
    ((op,), source) = case
    assert isinstance(op, Stride)
    x, elements = numbered(source), []
    for start in range(op.step):
        part = Stride(op.axis, start, op.step)
        assert part.shape(source) == op.shape(source)
        taken = np.asarray(part.apply(jnp.asarray(x), part.shape(source)))
        assert_same_bits(taken, x[(slice(None),) * op.axis + (slice(start, None, op.step),)])
        elements += taken.ravel().tolist()
    assert sorted(elements) == x.ravel().tolist()


@thorough
@given(with_box(slices()))
def test_of_a_range_only_rows_are_read_alone(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    """The first axis gives exactly what is needed; another one must be whole in the target, and is read whole."""
    ((op,), source, box) = case
    assert isinstance(op, Slice)
    x = numbered(source)
    index = (slice(None),) * op.axis + (slice(op.start, op.stop),)
    if op.axis == 0:
        assert ops.boxes((op,), box, source)[0] == bounds(needed((op,), box, source))
        assert_same_bits(x[ops.boxes((op,), box, source)[0].slices], x[index][box.slices])
    elif (box.start[op.axis], box.stop[op.axis]) == (0, op.stop - op.start):
        assert ops.boxes((op,), box, source)[0] == box.with_axis(op.axis, 0, source[op.axis])
    else:
        with pytest.raises(ValueError, match=f"cuts axis {op.axis}"):
            ops.boxes((op,), box, source)


@thorough
@given(transposes())
def test_a_transpose_is_numpys(case: Case) -> None:
    ((op,), source) = case
    assert isinstance(op, Transpose)
    x = numbered(source)
    assert op.shape(source) == x.transpose(op.order).shape
    assert_same_bits(expected((op,), x, Box.whole(op.shape(source))), np.ascontiguousarray(x.transpose(op.order)))
    assert_same_bits(x.transpose(op.order).transpose(op.invert(source).order), x)


@thorough
@given(with_box(permutations()))
def test_a_permuted_axis_must_be_whole(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    chain, source, box = case
    if (box.start[-1], box.stop[-1]) == (0, source[-1]):
        assert ops.boxes(chain, box, source)[0] == box
    else:
        with pytest.raises(ValueError, match="permuted"):
            ops.boxes(chain, box, source)


@thorough
@given(with_box(chains(partial=True)))
def test_the_place_of_a_box_does_not_change_the_shapes_on_the_way(case: tuple[tuple[Op, ...], Shape, Box]) -> None:
    """The device step is compiled once for all boxes of a shape."""
    chain, source, box = case
    at_origin = Box((0,) * len(box.start), box.shape)
    try:
        here, there = ops.boxes(chain, box, source), ops.boxes(chain, at_origin, source)
    except ValueError:
        return
    assert [step.shape for step in here] == [step.shape for step in there]


def test_bits_are_moved_untouched() -> None:
    """Every bfloat16 there is, NaNs with payloads and subnormals too."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    chain: tuple[Op, ...] = (Transpose(), Split(1, (4, 64)), InterleaveHalves())
    steps = [step.shape for step in ops.boxes(chain, Box.whole((256, 4, 64)), (256, 256))[1:]]
    found = ops.apply(chain, jnp.asarray(bits.view(ml_dtypes.bfloat16)), steps)
    assert_same_bits(np.asarray(found).view(np.uint16), expected(chain, bits, Box.whole((256, 4, 64))))


# ---- Backwards


@compiled
@given(chains())
def test_the_inverse_leads_back(case: Case) -> None:
    chain, source = case
    target = ops.target_shape(chain, source)
    inverse = ops.invert(chain, source)
    assert ops.target_shape(inverse, target) == source
    x = numbered(source)
    y = ops.apply(chain, jnp.asarray(x), [step.shape for step in ops.boxes(chain, Box.whole(target), source)[1:]])
    z = ops.apply(inverse, y, [step.shape for step in ops.boxes(inverse, Box.whole(source), target)[1:]])
    assert_same_bits(z, x)


@thorough
@given(chains())
def test_the_inverse_of_the_inverse_is_the_chain(case: Case) -> None:
    chain, source = case
    assert ops.invert(ops.invert(chain, source), ops.target_shape(chain, source)) == chain


@thorough
@given(chains(partial=True))
def test_nothing_undoes_what_leaves_elements_out(case: Case) -> None:
    chain, source = case
    if not any(isinstance(op, (Stride, Slice)) for op in chain):
        assert ops.target_shape(ops.invert(chain, source), ops.target_shape(chain, source)) == source
        return
    with pytest.raises(ValueError, match="leaves elements"):
        ops.invert(chain, source)


# ---- What the rotary permutation is


def test_rotary_halves_become_pairs() -> None:
    """The docstring, spelled out: t[2j] = s[j], t[2j + 1] = s[D/2 + j]."""
    x = jnp.arange(8)
    assert InterleaveHalves().apply(x, (8,)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert DeinterleaveHalves().apply(x, (8,)).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


# ---- Scale


def exact_scale(x: Array, factor: float) -> Array:
    """The product, rounded once: 24 by 24 significant bits fit float64, so only the last step rounds."""
    return (x.astype(np.float64) * np.float64(np.float32(factor))).astype(np.float32)


@pytest.mark.parametrize("factor", [128**-0.5, 64**-0.5, 192**-0.5, 12**-0.5, 0.1, -3.0, 1.0])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_scale_is_float32_and_rounds_once(factor: float, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000), [0.0, -0.0, np.inf, -np.inf, 1.0, 65504.0, 2.0**-14]]).astype(dtype)
    wanted = exact_scale(x, factor)
    assert_same_bits(Scale(factor).apply(jnp.asarray(x), x.shape), wanted)
    assert_same_bits(jax.jit(lambda y: Scale(factor).apply(y, x.shape))(jnp.asarray(x)), wanted)
    rounded = jax.jit(lambda y: Scale(factor).apply(y, x.shape).astype(jnp.bfloat16))(jnp.asarray(x))
    assert_same_bits(rounded, wanted.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("term", [1.0, -1.0, 0.1])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_offset_is_float32_and_rounds_once(term: float, dtype: Any) -> None:
    """A norm of Gemma near minus one: its sum in bfloat16 would be another number."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000), [0.0, -0.0, np.inf, -np.inf, -1.0, -0.99609375, 2.0**-14]])
    x = x.astype(dtype)
    # 24 significant bits at exponents this near fit float64, so only the last step rounds.
    wanted = (x.astype(np.float64) + np.float64(np.float32(term))).astype(np.float32)
    assert_same_bits(Offset(term).apply(jnp.asarray(x), x.shape), wanted)
    assert_same_bits(jax.jit(lambda y: Offset(term).apply(y, x.shape))(jnp.asarray(x)), wanted)
    rounded = jax.jit(lambda y: Offset(term).apply(y, x.shape).astype(jnp.bfloat16))(jnp.asarray(x))
    assert_same_bits(rounded, wanted.astype(ml_dtypes.bfloat16))


def test_which_ops_compute() -> None:
    """The device step decodes to float32 before these; all others give back the bits that they took."""
    classes = {each for each in vars(ops).values() if isinstance(each, type) and issubclass(each, ops.Computing)}
    assert classes - {ops.Computing} == {Scale, Offset}


def test_the_chain_of_llama_queries() -> None:
    """Transpose, split, interleave and scale together: `T[i, h, d] = W[h * D + half(d), i] / sqrt(D)`."""
    hidden, heads, dim = 10, 3, 12
    w = np.random.default_rng(0).standard_normal((heads * dim, hidden)).astype(ml_dtypes.bfloat16)
    chain = (Transpose(), Split(1, (heads, dim)), InterleaveHalves(), Scale(dim**-0.5))
    steps = [step.shape for step in ops.boxes(chain, Box.whole((hidden, heads, dim)), w.shape)[1:]]
    wanted = np.empty((hidden, heads, dim), np.float32)
    for i, h, d in np.ndindex(wanted.shape):
        row = h * dim + (d // 2 if d % 2 == 0 else dim // 2 + d // 2)
        wanted[i, h, d] = exact_scale(w[row, i], dim**-0.5)
    assert_same_bits(ops.apply(chain, jnp.asarray(w), steps), wanted)


# ---- What does not fit


@pytest.mark.parametrize(
    ("op", "source"),
    [
        (Transpose(), (4,)),
        (Transpose(), (2, 3, 4)),
        (Transpose((0, 2, 1)), (2, 3)),
        (Transpose((0, 0)), (2, 3)),
        (Transpose((0, 1, 1)), (2, 3, 4)),
        (Slice(0, 2, 5), (4,)),
        (Slice(1, -1, 2), (4, 5)),
        (Slice(0, 2, 2), (4,)),
        (Slice(0, 3, 2), (4,)),
        (Split(0, (2, 3)), (5,)),
        (Split(1, (2, 2)), (4, 5)),
        (InterleaveHalves(), (4, 3)),
        (DeinterleaveHalves(), (1,)),
        (Stride(1, 0, 2), (4, 5)),
        (Stride(0, 2, 2), (4,)),
        (Stride(0, -1, 2), (4,)),
        (Stride(0, 0, 0), (4,)),
    ],
    ids=str,
)
def test_an_op_that_does_not_fit_its_source(op: Op, source: Shape) -> None:
    with pytest.raises(ValueError):
        op.shape(source)
    with pytest.raises(ValueError):
        ops.boxes((op,), Box.whole(source), source)
