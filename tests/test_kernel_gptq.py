"""Every implementation of the GPTQ kernel, bit for bit against an oracle in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine_conformance import BF16, F32, Array, Case, Conformance, DType, check, scales
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from slicecast.kernels import affine
from slicecast.kernels.gptq import api, pallas_tpu, reference, shapes

pytestmark = pytest.mark.kernel


def pack(codes: Array, bits: int) -> Array:
    """int64[batch, in, out] to int32[batch, in * bits / 32, out]: rows follow each other from the lowest bits on."""
    per_word = 32 // bits
    words = sum(codes[:, j::per_word].astype(np.uint32) << np.uint32(bits * j) for j in range(per_word))
    return np.asarray(words, np.uint32).view(np.int32)


class GptqConformance(Conformance):
    """The tests of both formats."""

    widths = (4, 8, 2)

    def pack(self, codes: Array, bits: int) -> Array:
        """See the base class."""
        return pack(codes, bits)

    def dequantize(self, words: Array, scale: Array, zero: Array, *, bits: int, group_size: int, dtype: DType) -> Array:
        """See the base class."""
        function = functools.partial(
            api.dequantize,
            bits=bits,
            group_size=group_size,
            dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )
        return np.asarray(jax.jit(function)(words, scale, zero))


class TestReference(GptqConformance):
    """Plain JAX on the CPU."""

    implementation = "xla"
    cases = (
        Case(96, 24, 32),
        Case(320, 130, 16, batch=3),
        Case(384, 7, 64, batch=2),
        Case(256, 5, 128),
        # Groups that end within a word, and last groups that are shorter.
        Case(144, 9, 12),
        Case(16, 1, 1),
        Case(48, 3, 20),
        Case(304, 2, 100),
        Case(32, 4, 33),
    )

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        batch=st.integers(1, 3),
        words=st.integers(1, 30),
        columns=st.integers(1, 40),
        group_size=st.integers(1, 500),
        bits=st.sampled_from([2, 4, 8]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape(self, batch: int, words: int, columns: int, group_size: int, bits: int, seed: int) -> None:
        """Shapes that nobody thought of, down to a single word."""
        self.check(Case(words * 32 // bits, columns, group_size, batch), bits=bits, scale_dtype=F32, seed=seed)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_group_index(self, bits: int) -> None:
        """Elements in any order, with one order for each weight, and groups of different sizes."""
        random = np.random.default_rng(bits)
        codes = random.integers(0, 2**bits, (3, 96, 40))
        scale = scales((3, 7, 40), BF16, "wild", random)
        zero = random.integers(0, 2**bits, scale.shape, np.uint8)
        group_index = random.integers(0, 7, (3, 96), np.int32)
        function = functools.partial(api.dequantize, bits=bits, group_size=14, dtype=BF16)
        for implementation in ("auto", "xla"):
            actual = jax.jit(functools.partial(function, implementation=implementation))(
                pack(codes, bits), scale, zero, group_index=group_index
            )
            check(np.asarray(actual), codes, scale, zero, group_of_row=group_index)

    @pytest.mark.parametrize("shape", shapes.QWEN_2_5_72B, ids=str)
    def test_temporary_memory(self, shape: shapes.Shape) -> None:
        """No copy of the codes or of the result."""
        memory = jax.jit(shape.function("xla")).lower(*shape.operands(2)).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 2 * shape.rows * shape.columns // 100


class PallasConformance(GptqConformance):
    """The TPU kernel in an interpreter."""

    implementation = "pallas_tpu"
    # The first is ragged in everything: blocks, strips and the last group.
    cases = (
        Case(336, 200, 128, batch=2),
        Case(1552, 136, 64),
        Case(2064, 128, 32),
        Case(512, 129, 16),
        Case(1040, 640, 48),
        Case(1312, 128, 96),
        # One group, larger than a block; groups larger than a block, and more of them than a block of scales has.
        Case(1104, 128, 1104),
        Case(3072, 130, 1536),
        Case(9 * 1152, 8, 1152),
        # Less than a block.
        Case(16, 1, 16),
        Case(32, 64, 100),
    )


class TestPallasGenericInterpreter(PallasConformance):
    """The kernel's arithmetic."""

    interpret = True

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        words=st.integers(1, 100),
        columns=st.integers(1, 300),
        tiles=st.integers(1, 20),
        bits=st.sampled_from([2, 4, 8]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_supported_shape(self, words: int, columns: int, tiles: int, bits: int, seed: int) -> None:
        """Shapes that nobody thought of."""
        self.check(Case(words * 32 // bits, columns, tiles * affine.TILE_ROWS), bits=bits, seed=seed)


class TestPallasTpuInterpreter(PallasConformance):
    """The kernel's memory accesses: the interpreter simulates the TPU's memories and copies, and looks for races."""

    # Two cores divide the grid, copies happen as late as they may, and what was never written reads as NaN.
    interpret = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
    )
    # Fewer and smaller shapes than for the other interpreter: this one takes seconds each.
    cases = (Case(144, 200, 64), Case(1552, 136, 64))


# Block sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_real_shapes_are_supported(shape: shapes.Shape) -> None:
    assert pallas_tpu.supported(shape.rows, shape.columns, shape.group_size) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 30000),
    columns=st.integers(1, 30000),
    group_size=st.one_of(st.sampled_from([16, 32, 64, 128, 256, 512, 1024]), st.integers(1, 9000)),
    unit=st.sampled_from([128, 1024]),
)
def test_blocks_obey_the_constraints(rows: int, columns: int, group_size: int, unit: int) -> None:
    blocks = affine.choose_blocks(rows, columns, group_size, unit=unit)
    if isinstance(blocks, str):
        assert group_size < rows
        assert group_size % 16 or group_size > affine.MAX_ELEMENTS // unit // 128
        return
    # Whole register tiles, of not too much, and not more than one block beyond the weight.
    assert blocks.strip % 16 == 0
    assert blocks.rows % blocks.strip == 0
    assert blocks.rows % 128 == 0
    assert blocks.columns % unit == 0
    assert blocks.scales % 8 == 0
    assert blocks.rows * blocks.columns <= affine.MAX_ELEMENTS
    assert blocks.columns < columns + unit
    # The groups of every strip lie in the block of scales that its block of rows selects, where the kernel looks.
    for first in range(0, rows, blocks.strip):
        last = min(first + blocks.strip, rows) - 1
        block_of_scales = first // blocks.rows // blocks.steps
        group = first // group_size
        assert group // blocks.scales == last // group_size // blocks.scales == block_of_scales
        shared = min(blocks.group_size, blocks.strip)
        assert last // group_size - group == (last - first) // shared
        assert first % shared == 0


# The entry point -----------------------------------------------------------------------------------------------------


def small(rows: int = 64, columns: int = 128, group_size: int = 32) -> tuple[Array, Array, Array, Array]:
    """Codes of 4 bits, words, scales and zeros."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (2, rows, columns))
    groups = (2, -(-rows // group_size), columns)
    zero = random.integers(0, 16, groups, np.uint8)
    return codes, pack(codes, 4), scales(groups, BF16, "tame", random), zero


@pytest.mark.parametrize(
    ("implementation", "interpret", "group_size"),
    [("auto", False, 32), ("auto", False, 24), ("xla", False, 32), ("pallas_tpu", True, 32)],
)
def test_every_implementation_is_reachable_and_equal(implementation: Any, interpret: bool, group_size: int) -> None:
    codes, words, scale, zero = small(group_size=group_size)
    # Also outside of a program.
    actual = api.dequantize(
        words,
        scale,
        zero,
        bits=4,
        group_size=group_size,
        dtype=BF16,
        implementation=implementation,
        interpret=interpret,
    )
    group_of_row = np.broadcast_to(np.arange(64) // group_size, (2, 64))
    check(np.asarray(actual), codes, scale, zero, group_of_row=group_of_row)


@pytest.mark.parametrize(
    ("group_size", "sentence"),
    [(24, "group size 24 is not a multiple of 16"), (4112, "a block of whole groups of 4112 needs 32896 rows")],
)
def test_explicit_kernel_says_why_it_does_not_apply(group_size: int, sentence: str) -> None:
    _, words, scale, zero = small(8224, 2, group_size)
    with pytest.raises(ValueError, match=sentence):
        api.dequantize(words, scale, zero, bits=4, group_size=group_size, dtype=BF16, implementation="pallas_tpu")


def test_explicit_kernel_takes_no_group_index() -> None:
    _, words, scale, zero = small()
    group_index = np.zeros((2, 64), np.int32)
    with pytest.raises(ValueError, match="the scales of each row are gathered"):
        api.dequantize(
            words,
            scale,
            zero,
            bits=4,
            group_size=32,
            dtype=BF16,
            group_index=group_index,
            implementation="pallas_tpu",
        )


GOOD: dict[str, Any] = {
    "words": ((2, 8, 5), "int32"),
    "scale": ((2, 2, 5), "float16"),
    "zero": ((2, 2, 5), "uint8"),
    "bits": 4,
    "group_size": 32,
    "dtype": "float32",
}
"""Arguments that fit."""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": 3}, "bits must be one of"),
        ({"words": ((8, 5), "int32")}, "words must be"),
        ({"words": ((2, 8, 5), "uint32")}, "words must be"),
        ({"words": ((2, 8, 0), "int32")}, "must not be empty"),
        ({"group_size": 0}, "must be positive"),
        ({"group_size": 31}, "scale must have the shape"),
        ({"scale": ((2, 2, 5), "int32")}, "scale must be bfloat16"),
        ({"scale": ((2, 2, 4), "float16")}, "scale must have the shape"),
        ({"zero": ((2, 2, 5), "int8")}, "zero must be uint8"),
        ({"zero": ((2, 1, 5), "uint8")}, "zero must have the shape"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"group_index": ((2, 63), "int32")}, "group_index must be"),
        ({"group_index": ((2, 64), "int16")}, "group_index must be"),
        ({"implementation": "triton"}, "implementation must be one of"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], sentence: str) -> None:
    def call(**changes: Any) -> jax.Array:
        arguments = {**GOOD, **changes}
        return api.dequantize(**{k: jnp.zeros(*v) if isinstance(v, tuple) else v for k, v in arguments.items()})

    assert call().shape == (2, 64, 5)
    with pytest.raises(ValueError, match=sentence):
        call(**changes)


@pytest.mark.parametrize("wrong_bits", [2, 4, 8])
def test_kernel_agrees_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, wrong_bits: int) -> None:
    right = reference.dequantize

    def wrong_in_one_value(words: jax.Array, scale: jax.Array, zero: jax.Array, **options: Any) -> jax.Array:
        y = right(words, scale, zero, **options)
        return y.at[1, 2111, 1087].add(1) if options["bits"] == wrong_bits else y

    monkeypatch.setattr(reference, "dequantize", wrong_in_one_value)
    assert not api.kernel_agrees(jax.devices()[0], interpret=True)


def test_kernel_agrees() -> None:
    assert api.kernel_agrees(jax.devices()[0], interpret=True)
