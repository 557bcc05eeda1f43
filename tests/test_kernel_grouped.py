"""Every implementation of the grouped kernel, bit for bit against NumPy."""

from __future__ import annotations

import abc
from typing import Any

import jax
import numpy as np
import pytest
from grouped_weights import BF16, CODES, F32, SCALES, U8, Array, Case, Weight, exhaustive, random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from slicecast.kernels.grouped import Code, ScaleFormat, formats, pallas_tpu, reference, shapes

pytestmark = pytest.mark.kernel


class Conformance(abc.ABC):
    """The behavior of the operation, whatever implements it."""

    cases: tuple[Case, ...]
    """Small weights that the implementation supports whatever the code, with ragged edges."""

    codes: tuple[Code, ...] = CODES
    """The codes of the exhaustive test."""

    @abc.abstractmethod
    def run(self, weight: Weight, dtype: np.dtype[Any]) -> Array:
        """Runs the implementation."""

    def check(self, weight: Weight, dtype: np.dtype[Any]) -> None:
        """Runs the implementation and compares with the oracle."""
        actual = self.run(weight, dtype)
        assert actual.dtype == dtype
        weight.check(actual)

    @pytest.mark.parametrize(("scale_format", "scale_dtype"), SCALES, ids=str)
    def test_every_code_with_every_scale(self, scale_format: ScaleFormat, scale_dtype: np.dtype[Any]) -> None:
        """All pairs, 65536 where both are bytes."""
        for code in self.codes:
            weight = exhaustive(code, scale_format, scale_dtype)
            for dtype in (BF16, F32):
                self.check(weight, dtype)

    @pytest.mark.parametrize("code", formats.INTEGERS)
    def test_zeros(self, code: Code) -> None:
        """A zero for each group."""
        self.check(random(code, "float", F32, self.cases[0], zero=True), F32)
        self.check(random(code, "e8m0", U8, self.cases[1], zero=True), BF16)

    def test_group_sizes_and_ragged_edges(self) -> None:
        """Every way to divide the work, in alternating codes and formats."""
        for seed, case in enumerate(self.cases):
            for code in (CODES[seed % 6], CODES[(seed + 3) % 6]):
                scale_format, scale_dtype = SCALES[seed % 5]
                self.check(random(code, scale_format, scale_dtype, case, seed=seed), (BF16, F32)[seed % 2])

    def test_order_of_elements(self) -> None:
        """Seen without arithmetic: element k of row n holds the nibble (k + n) % 16."""
        case = self.cases[0]
        nibbles = np.add.outer(np.arange(case.rows), np.arange(case.columns)) % 16
        codes = (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).astype(np.uint8)[None]
        scale = np.ones((1, case.rows, case.columns // case.group_size), BF16)
        actual = self.run(Weight("int4_offset", "float", codes, scale), F32)
        np.testing.assert_array_equal(actual[0], (nibbles.T - 8).astype(np.float32), strict=True)


class TestReference(Conformance):
    """Plain JAX on the CPU."""

    cases = (
        Case(24, 96, 32),
        Case(130, 320, 16, batch=3),
        Case(7, 384, 64, batch=2),
        Case(5, 256, 128),
        Case(9, 140, 140),
        Case(1, 2, 1),
        Case(3, 6, 3),
        Case(2, 302, 2),
    )

    def run(self, weight: Weight, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        function = jax.jit(reference.dequantize, static_argnames=("code", "group_size", "dtype", "scale_format"))
        return np.asarray(function(**weight.keywords(), dtype=dtype))

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        batch=st.integers(1, 3),
        rows=st.integers(1, 40),
        group_size=st.integers(1, 70),
        groups=st.integers(1, 6),
        code=st.sampled_from(CODES),
        scales=st.sampled_from(SCALES),
        dtype=st.sampled_from([BF16, F32]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape(
        self,
        batch: int,
        rows: int,
        group_size: int,
        groups: int,
        code: Code,
        scales: tuple[ScaleFormat, np.dtype[Any]],
        dtype: np.dtype[Any],
        seed: int,
    ) -> None:
        """Shapes that nobody thought of, down to a single byte."""
        groups += group_size * groups % 2
        self.check(random(code, *scales, Case(rows, group_size * groups, group_size, batch), seed=seed), dtype)

    @pytest.mark.parametrize("shape", [*shapes.KIMI_K2, *shapes.DEEPSEEK_V3[:2]], ids=str)
    def test_temporary_memory(self, shape: shapes.Shape) -> None:
        """No copy of the whole output, in float32 or otherwise."""
        operands = shape.operands(batch=2)
        memory = jax.jit(shape.function("xla")).lower(*operands).compile().memory_analysis()
        assert memory is not None
        # A transposed copy of the codes, one of the scales, which are at most an eighth of that, and nothing of note.
        assert memory.temp_size_in_bytes < operands[0].size * 5 // 4


class PallasConformance(Conformance):
    """The TPU kernel in an interpreter."""

    cases: tuple[Case, ...] = (
        Case(128, 256, 32),
        Case(136, 320, 16, batch=2),
        Case(200, 1088, 64),
        Case(128, 640, 128),
        Case(160, 300, 300),
        Case(128, 1536, 256),
        Case(7, 48, 16),
        Case(100, 8, 8),
        # Sides with which XLA stores the codes, or the result, transposed.
        Case(160, 1344, 32),
        Case(72, 512, 64),
    )
    interpret: bool | pltpu.InterpretParams

    def run(self, weight: Weight, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        return np.asarray(pallas_tpu.dequantize(**weight.keywords(), dtype=dtype, interpret=self.interpret))


class TestPallasGenericInterpreter(PallasConformance):
    """The kernel's arithmetic."""

    interpret = True

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        rows=st.integers(1, 300),
        group_size=st.sampled_from([8, 16, 32, 64, 128, 192, 256]),
        groups=st.integers(1, 40),
        code=st.sampled_from(CODES),
        scales=st.sampled_from(SCALES),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_supported_shape(
        self,
        rows: int,
        group_size: int,
        groups: int,
        code: Code,
        scales: tuple[ScaleFormat, np.dtype[Any]],
        seed: int,
    ) -> None:
        """Shapes that nobody thought of."""
        groups = min(groups, 2048 // group_size)
        self.check(random(code, *scales, Case(rows, group_size * groups, group_size), seed=seed), BF16)


class TestPallasTpuInterpreter(PallasConformance):
    """The kernel's memory accesses: the interpreter simulates the TPU's memories and copies, and looks for races."""

    # Two cores divide the grid, copies happen as late as they may, and what was never written reads as NaN.
    interpret = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
    )
    # Less than the other interpreter: this one takes seconds for each.
    cases = (*PallasConformance.cases[:2], *PallasConformance.cases[-2:])
    codes = ("e2m1", "e4m3")

    def run(self, weight: Weight, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        result = super().run(weight, dtype)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found
        return result
