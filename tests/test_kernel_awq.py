"""Every implementation of the AWQ kernel, bit for bit against an oracle in NumPy."""

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

from slicecast.kernels.awq import api, pallas_tpu, reference, shapes

pytestmark = pytest.mark.kernel

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of its word each of eight columns is."""


def pack(codes: Array) -> Array:
    """int64[batch, in, out] to int32[batch, in, ceil(out / 8)]; what a last word does not need is filled with ones."""
    missing = -codes.shape[2] % 8
    codes = np.pad(codes, ((0, 0), (0, 0), (0, missing)), constant_values=15)
    words = sum(codes[:, :, i::8].astype(np.uint32) << np.uint32(4 * ORDER[i]) for i in range(8))
    return np.asarray(words, np.uint32).view(np.int32)


class AwqConformance(Conformance):
    """The tests of both formats."""

    widths = (4,)

    def pack(self, codes: Array, bits: int) -> Array:
        """See the base class."""
        assert bits == 4
        return pack(codes)

    def dequantize(self, words: Array, scale: Array, zero: Array, *, bits: int, group_size: int, dtype: DType) -> Array:
        """See the base class."""
        function = functools.partial(
            api.dequantize,
            group_size=group_size,
            dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )
        return np.asarray(jax.jit(function)(words, scale, zero))

    def test_more_words_than_needed(self) -> None:
        """Words beyond the columns are not looked at."""
        random = np.random.default_rng(0)
        codes = random.integers(0, 16, (2, 64, 200))
        scale = scales((2, 2, 200), BF16, "tame", random)
        zero = random.integers(0, 16, scale.shape, np.uint8)
        words = np.pad(pack(codes), ((0, 0), (0, 0), (0, api.padded_words(200) - 25)), constant_values=-1)
        actual = self.dequantize(words, scale, zero, bits=4, group_size=32, dtype=BF16)
        check(actual, codes, scale, zero, group_of_row=np.broadcast_to(np.arange(64) // 32, (2, 64)))


class TestReference(AwqConformance):
    """Plain JAX on the CPU."""

    implementation = "xla"
    cases = (
        Case(96, 24, 32),
        Case(320, 130, 16, batch=3),
        Case(7, 384, 7, batch=2),
        Case(1, 8, 1),
        Case(1, 1, 5),
        # Last groups that are shorter.
        Case(50, 9, 12),
        Case(301, 16, 100),
    )

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        batch=st.integers(1, 3),
        rows=st.integers(1, 200),
        columns=st.integers(1, 90),
        group_size=st.integers(1, 250),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape(self, batch: int, rows: int, columns: int, group_size: int, seed: int) -> None:
        """Shapes that nobody thought of, down to a single code."""
        self.check(Case(rows, columns, group_size, batch), bits=4, scale_dtype=F32, seed=seed)

    @pytest.mark.parametrize("shape", shapes.QWEN_2_5_72B, ids=str)
    def test_temporary_memory(self, shape: shapes.Shape) -> None:
        """No copy of the codes or of the result."""
        memory = jax.jit(shape.function("xla")).lower(*shape.operands(2)).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 2 * shape.rows * shape.columns // 100


class PallasConformance(AwqConformance):
    """The TPU kernel in an interpreter."""

    implementation = "pallas_tpu"
    # The first is ragged in everything: blocks, strips, words and the last group.
    cases = (
        Case(331, 1033, 128, batch=2),
        Case(600, 1536, 64),
        Case(528, 1024, 32),
        Case(130, 2048, 16),
        Case(700, 136, 48),
        Case(500, 1024, 96),
        # One group, larger than a block; groups larger than a block.
        Case(1104, 8, 1104),
        Case(2000, 1024, 768),
        # More groups than a block of scales has, which several blocks share.
        Case(1160, 8, 128),
        # Less than a block.
        Case(1, 1, 16),
        Case(32, 64, 100),
    )


class TestPallasGenericInterpreter(PallasConformance):
    """The kernel's arithmetic."""

    interpret = True

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        rows=st.integers(1, 1200),
        columns=st.integers(1, 1500),
        group_size=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256, 384, 512, 1024]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_supported_shape(self, rows: int, columns: int, group_size: int, seed: int) -> None:
        """Shapes that nobody thought of."""
        if pallas_tpu.supported(rows, columns, group_size) is None:
            self.check(Case(rows, columns, group_size), bits=4, seed=seed)
        else:
            assert group_size == 80


class TestPallasTpuInterpreter(PallasConformance):
    """The kernel's memory accesses: the interpreter simulates the TPU's memories and copies, and looks for races."""

    # Two cores divide the grid, copies happen as late as they may, and what was never written reads as NaN.
    interpret = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
    )
    # Fewer and smaller shapes than for the other interpreter: this one takes seconds each.
    cases = (Case(144, 1032, 64), Case(600, 136, 64))


@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_real_shapes_are_supported(shape: shapes.Shape) -> None:
    assert pallas_tpu.supported(shape.rows, shape.columns, shape.group_size) is None


@pytest.mark.parametrize(("columns", "words"), [(1, 128), (1024, 128), (1025, 256), (29568, 3712)])
def test_padded_words(columns: int, words: int) -> None:
    assert api.padded_words(columns) == words


# The entry point -----------------------------------------------------------------------------------------------------


def small(rows: int = 64, columns: int = 128, group_size: int = 32) -> tuple[Array, Array, Array, Array]:
    """Codes, words, scales and zeros."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (2, rows, columns))
    groups = (2, -(-rows // group_size), columns)
    zero = random.integers(0, 16, groups, np.uint8)
    return codes, pack(codes), scales(groups, BF16, "tame", random), zero


@pytest.mark.parametrize(
    ("implementation", "interpret", "group_size"),
    [("auto", False, 32), ("auto", False, 24), ("xla", False, 32), ("pallas_tpu", True, 32)],
)
def test_every_implementation_is_reachable_and_equal(implementation: Any, interpret: bool, group_size: int) -> None:
    codes, words, scale, zero = small(group_size=group_size)
    # Also outside of a program.
    actual = api.dequantize(
        words, scale, zero, group_size=group_size, dtype=BF16, implementation=implementation, interpret=interpret
    )
    group_of_row = np.broadcast_to(np.arange(64) // group_size, (2, 64))
    check(np.asarray(actual), codes, scale, zero, group_of_row=group_of_row)


@pytest.mark.parametrize(
    ("group_size", "sentence"),
    [(24, "group size 24 is not a multiple of 16"), (80, "a block of whole groups of 80 needs 640 rows")],
)
def test_explicit_kernel_says_why_it_does_not_apply(group_size: int, sentence: str) -> None:
    _, words, scale, zero = small(group_size * 2, 8, group_size)
    with pytest.raises(ValueError, match=sentence):
        api.dequantize(words, scale, zero, group_size=group_size, dtype=BF16, implementation="pallas_tpu")


GOOD: dict[str, Any] = {
    "words": ((2, 64, 2), "int32"),
    "scale": ((2, 2, 13), "float16"),
    "zero": ((2, 2, 13), "uint8"),
    "group_size": 32,
    "dtype": "float32",
}
"""Arguments that fit."""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"words": ((64, 2), "int32")}, "words must be"),
        ({"words": ((2, 64, 2), "uint32")}, "words must be"),
        ({"words": ((2, 64, 1), "int32")}, "1 words a row hold 8 columns, not 13"),
        ({"words": ((2, 0, 2), "int32")}, "must be empty"),
        ({"group_size": 0}, "must be positive"),
        ({"group_size": 31}, "scale must have the shape"),
        ({"scale": ((2, 13), "float16")}, "scale must be"),
        ({"scale": ((2, 2, 0), "float16")}, "must be empty"),
        ({"scale": ((2, 2, 13), "int32")}, "scale must be bfloat16"),
        ({"zero": ((2, 2, 13), "int8")}, "zero must be uint8"),
        ({"zero": ((2, 2, 14), "uint8")}, "zero must have the shape"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"implementation": "triton"}, "implementation must be one of"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], sentence: str) -> None:
    def call(**changes: Any) -> jax.Array:
        arguments = {**GOOD, **changes}
        return api.dequantize(**{k: jnp.zeros(*v) if isinstance(v, tuple) else v for k, v in arguments.items()})

    assert call().shape == (2, 64, 13)
    with pytest.raises(ValueError, match=sentence):
        call(**changes)


def test_kernel_agrees_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    assert api.kernel_agrees(device, interpret=True)
    right = reference.dequantize

    def wrong_in_one_value(words: jax.Array, scale: jax.Array, zero: jax.Array, **options: Any) -> jax.Array:
        return right(words, scale, zero, **options).at[1, 1087, 2111].add(1)

    monkeypatch.setattr(reference, "dequantize", wrong_in_one_value)
    assert not api.kernel_agrees(device, interpret=True)
