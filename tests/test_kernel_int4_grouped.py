"""Every implementation of the INT4 kernel, bit for bit against integer arithmetic and against compressed-tensors."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import multiprocessing
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slicecast.kernels.int4_grouped import api, pallas_tpu, reference, shapes

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)

EDGES = {BF16: (0x7F7F, 0x0080, 0x0001), F16: (0x7BFF, 0x0400, 0x0001), F32: (0x7F7FFFFF, 0x00800000, 0x00000001)}
"""The bits of each dtype's largest number, smallest normal number, and smallest subnormal number."""

GOLDEN = pathlib.Path(__file__).parent / "golden" / "quant"


# The oracle ----------------------------------------------------------------------------------------------------------


def unpack(packed: Array) -> Array:
    """uint8[..., in/2] to the signed values int64[..., in]."""
    wide = packed.astype(np.int64)
    return np.stack([wide % 16, wide // 16], axis=-1).reshape(*packed.shape[:-1], -1) - 8


def float32_bits(scale: Array) -> Array:
    """The float32 bits, as int64, of finite or special values of any of the three scale dtypes; widening is exact."""
    if scale.dtype == BF16:
        return scale.view(np.uint16).astype(np.int64) << 16
    return scale.astype(np.float32).view(np.uint32).astype(np.int64)


def bit_length(x: Array) -> Array:
    """The number of bits of each non-negative integer below 2^32."""
    return sum(((x >> i) > 0).astype(np.int64) for i in range(32))  # type: ignore[return-value]


def round_to(mantissa: Array, exponent: Array, bits: int) -> tuple[Array, Array]:
    """Rounds `mantissa * 2^exponent` to nearest even, to a float of `bits` significant bits and float32's exponents."""
    smallest = -126 - (bits - 1)
    drop = np.maximum(np.maximum(bit_length(mantissa) - bits, smallest - exponent), 0)
    drop = np.minimum(drop, 40)
    kept, rest, half = mantissa >> drop, mantissa & ((1 << drop) - 1), (1 << drop) >> 1
    kept += ((rest > half) | ((rest == half) & (kept % 2 == 1))) & (drop > 0)
    return kept, exponent + drop


def encode(mantissa: Array, exponent: Array, bits: int) -> Array:
    """The bits, without a sign, of `mantissa * 2^exponent`, which is representable or overflows."""
    shift = bits - bit_length(mantissa)
    shift = np.where(
        exponent - shift < -126 - (bits - 1), exponent + 126 + bits - 1, shift
    )  # Subnormal: no hidden bit.
    shifted = np.where(shift >= 0, mantissa << np.maximum(shift, 0), mantissa >> np.maximum(-shift, 0))
    biased = exponent - shift + (bits - 1) + 127
    hidden = 1 << (bits - 1)
    finite = np.where(shifted >= hidden, (biased << (bits - 1)) + shifted - hidden, shifted)
    infinity = 255 << (bits - 1)
    return np.where(mantissa == 0, 0, np.where(biased >= 255, infinity, finite))


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the definition says, with the freedom it leaves.

    Attributes:
      bits: uint16 or uint32[batch, in, out], the exact answer.
      nan: bool, where any NaN will do.
      tiny: bool, where signed zero will do as well. XLA:CPU flushes subnormal operands and products to zero. So these
        are the elements with a subnormal scale, and those whose exact product is below 2^-126.
    """

    bits: Array
    nan: Array
    tiny: Array

    def check(self, actual: Array) -> None:
        """Asserts that `actual`, bfloat16 or float32[batch, in, out], is what the definition says."""
        assert actual.shape == self.bits.shape
        bits = actual.view(self.bits.dtype)
        zero = self.bits & self.bits.dtype.type(1 << (8 * bits.itemsize - 1))
        ok = (bits == self.bits) | (self.tiny & (bits == zero))
        ok = np.where(self.nan, np.isnan(actual.astype(np.float32)), ok)
        wrong = np.argwhere(~ok)
        assert not len(wrong), [(tuple(i), hex(bits[tuple(i)]), hex(self.bits[tuple(i)])) for i in wrong[:5]]


def expect(packed: Array, scale: Array, group_size: int, dtype: np.dtype[Any]) -> Expected:
    """The definition in integer arithmetic: a float32 product, then one rounding to `dtype`."""
    q = unpack(packed).swapaxes(1, 2)
    s = np.repeat(float32_bits(scale), group_size, axis=2).swapaxes(1, 2)
    sign, biased, fraction = s >> 31, (s >> 23) & 255, s & 0x7FFFFF
    mantissa = np.abs(q) * (fraction + np.where(biased > 0, 1 << 23, 0))
    exponent = np.maximum(biased, 1) - 150
    special = biased == 255
    nan = special & ((fraction != 0) | (q == 0))
    tiny = (mantissa > 0) & ((biased == 0) | (bit_length(mantissa) + exponent <= -126)) & ~special
    # The float32 product is exact unless the scale has more than 20 significant bits.
    product, product_exponent = round_to(mantissa, exponent, 24)
    bits = 24 if dtype == F32 else 8
    magnitude = encode(*round_to(product, product_exponent, bits), bits)
    magnitude = np.where(special, 255 << (bits - 1), magnitude)
    word = np.uint32 if dtype == F32 else np.uint16
    negative = sign ^ (q < 0)
    return Expected((magnitude + (negative << (8 * np.dtype(word).itemsize - 1))).astype(word), nan, tiny)


def test_oracle_agrees_with_numpy_where_both_are_defined() -> None:
    packed, scale = operands(batch=1, rows=64, columns=64, group_size=2, scale_dtype=F32, kind="wild")
    q = unpack(packed).swapaxes(1, 2).astype(np.float32)
    with np.errstate(all="ignore"):
        product = q * np.repeat(scale, 2, axis=2).swapaxes(1, 2)
        for dtype in (BF16, F32):
            expected = expect(packed, scale, 2, dtype)
            actual = product.astype(dtype)
            np.testing.assert_array_equal(np.isnan(product), expected.nan)
            np.testing.assert_array_equal(
                actual.view(expected.bits.dtype)[~expected.nan], expected.bits[~expected.nan], strict=True
            )


# The operands --------------------------------------------------------------------------------------------------------


def operands(
    *, batch: int, rows: int, columns: int, group_size: int, scale_dtype: np.dtype[Any], kind: str, seed: int = 0
) -> tuple[Array, Array]:
    """Random bytes, and scales that are "tame" (like a model's), "wild" (any bits), or "special" (zeros, inf, NaN)."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (batch, rows, columns // 2), np.uint8)
    shape = (batch, rows, columns // group_size)
    if kind == "tame":
        scale = (rng.standard_normal(shape) / 64).astype(scale_dtype)
    elif kind == "wild":
        word = np.uint32 if scale_dtype == F32 else np.uint16
        scale = rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True).view(scale_dtype)
    else:
        values = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], scale_dtype)
        edges = np.array(EDGES[scale_dtype], np.uint32 if scale_dtype == F32 else np.uint16).view(scale_dtype)
        scale = np.concatenate([values, edges, -edges])[rng.integers(0, 13, shape)]
    return packed, scale


# The tests every implementation inherits -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One small weight."""

    rows: int
    columns: int
    group_size: int
    batch: int = 1


class Conformance(abc.ABC):
    """The behavior of the operation, whatever implements it."""

    cases: tuple[Case, ...]
    """Small weights that the implementation supports, with ragged edges."""

    @abc.abstractmethod
    def run(self, packed: Array, scale: Array, group_size: int, dtype: np.dtype[Any]) -> Array:
        """Runs the implementation."""

    def check(self, case: Case, *, scale_dtype: np.dtype[Any], dtype: np.dtype[Any], kind: str, seed: int = 0) -> None:
        """Runs the implementation on random operands and compares with the oracle."""
        packed, scale = operands(**dataclasses.asdict(case), scale_dtype=scale_dtype, kind=kind, seed=seed)
        actual = self.run(packed, scale, case.group_size, dtype)
        assert actual.dtype == dtype
        expect(packed, scale, case.group_size, dtype).check(actual)

    def test_group_sizes_and_ragged_edges(self) -> None:
        """Every way to divide the work, in alternating dtypes."""
        for seed, case in enumerate(self.cases):
            self.check(case, scale_dtype=BF16, dtype=(BF16, F32)[seed % 2], kind="wild", seed=seed)

    @pytest.mark.parametrize("kind", ["tame", "wild", "special"])
    @pytest.mark.parametrize("scale_dtype", [BF16, F16, F32], ids=str)
    @pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
    def test_scale_values(self, scale_dtype: np.dtype[Any], dtype: np.dtype[Any], kind: str) -> None:
        """Every scale dtype, from the values of a model to infinities and subnormal numbers."""
        self.check(self.cases[0], scale_dtype=scale_dtype, dtype=dtype, kind=kind)

    def test_every_nibble_in_every_place(self) -> None:
        """The order of the elements, seen without arithmetic: element k of row n holds the nibble (k + n) % 16."""
        case = self.cases[0]
        nibbles = np.add.outer(np.arange(case.rows), np.arange(case.columns)) % 16
        packed = (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).astype(np.uint8)[None]
        scale = np.ones((1, case.rows, case.columns // case.group_size), BF16)
        actual = self.run(packed, scale, case.group_size, F32)
        np.testing.assert_array_equal(actual[0], (nibbles.T - 8).astype(np.float32), strict=True)

    @pytest.mark.parametrize("path", sorted(GOLDEN.glob("CT_pack_quantized_int4_sym_*.npz")), ids=lambda p: p.stem[27:])
    def test_golden_vectors(self, path: pathlib.Path) -> None:
        """What the library of the format computed once."""
        with np.load(path) as golden:
            meta = json.loads(str(golden["meta"]))
            packed, scale, expected = golden["t.p"], golden["t.s"], golden["expected"]
        assert meta["exact"]
        scale = scale.view(BF16) if "s" in meta["bf16"] else scale
        # Three copies: the vectors have fewer rows than the smallest block of the TPU kernel.
        packed, scale, expected = (np.tile(x, (3, 1)) for x in (packed, scale, expected))
        actual = self.run(packed.view(np.uint8)[None], scale[None], expected.shape[1] // scale.shape[1], BF16)
        np.testing.assert_array_equal(actual[0].view(np.uint16), expected.T, strict=True)

    @pytest.mark.parametrize("strategy", ["group", "channel"])
    def test_compressed_tensors(self, strategy: str) -> None:
        """What the library of the format computes now."""
        rows, columns = 136, 320
        group_size = 32 if strategy == "group" else columns
        rng = np.random.default_rng(1)
        q = torch.from_numpy(rng.integers(-8, 8, (rows, columns), np.int8))
        scale = torch.from_numpy(rng.standard_normal((rows, columns // group_size)).astype(np.float32)).bfloat16()
        packed = pack_to_int32(q, 4)
        assert torch.equal(unpack_from_int32(packed, 4, q.shape), q)
        weights = QuantizationArgs(num_bits=4, strategy=strategy, group_size=32 if strategy == "group" else None)
        state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        expected = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=weights))["weight"]
        assert expected.dtype == torch.bfloat16
        actual = self.run(
            packed.numpy().view(np.uint8)[None], scale.view(torch.uint16).numpy().view(BF16)[None], group_size, BF16
        )
        np.testing.assert_array_equal(actual[0].view(np.uint16), expected.view(torch.uint16).numpy().T, strict=True)


class TestReference(Conformance):
    """Plain JAX on the CPU."""

    cases: tuple[Case, ...] = (
        Case(24, 96, 32),
        Case(130, 320, 16, batch=3),
        Case(7, 384, 64, batch=2),
        Case(5, 256, 128),
        Case(9, 140, 140),
        Case(1, 2, 1),
        Case(3, 6, 3),
        Case(2, 302, 2),
    )

    def run(self, packed: Array, scale: Array, group_size: int, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        function = jax.jit(reference.dequantize, static_argnames=("group_size", "dtype"))
        return np.asarray(function(jnp.asarray(packed), jnp.asarray(scale), group_size=group_size, dtype=dtype))

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        batch=st.integers(1, 3),
        rows=st.integers(1, 40),
        group_size=st.integers(1, 70),
        groups=st.integers(1, 6),
        dtype=st.sampled_from([BF16, F32]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape(
        self, batch: int, rows: int, group_size: int, groups: int, dtype: np.dtype[Any], seed: int
    ) -> None:
        """Shapes that nobody thought of, down to a single byte."""
        groups += group_size * groups % 2
        case = Case(rows, group_size * groups, group_size, batch)
        self.check(case, scale_dtype=F32, dtype=dtype, kind="wild", seed=seed)

    @pytest.mark.parametrize("shape", shapes.KIMI_K2, ids=str)
    def test_temporary_memory(self, shape: shapes.Shape) -> None:
        """No copy of the whole output, in float32 or otherwise."""
        packed = jax.ShapeDtypeStruct((2, shape.rows, shape.columns // 2), jnp.uint8)
        scale = jax.ShapeDtypeStruct((2, shape.rows, shape.columns // shape.group_size), jnp.bfloat16)
        function = jax.jit(reference.dequantize, static_argnames=("group_size", "dtype"))
        compiled = function.lower(packed, scale, group_size=shape.group_size, dtype=BF16).compile()
        # A transposed copy of the bytes (1/4 of the output), one of the scales (1/32), and nothing else of note.
        output = 2 * 2 * shape.rows * shape.columns
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < output * 5 // 16


class PallasConformance(Conformance):
    """The TPU kernel in an interpreter."""

    cases: tuple[Case, ...] = (
        Case(128, 256, 32),
        Case(136, 320, 16, batch=2),
        Case(200, 1088, 64),
        Case(128, 640, 128),
        Case(160, 300, 300),
        Case(128, 1536, 256),
        Case(128, 1536, 768),
        Case(128, 2560, 1280),
    )
    interpret: bool | pltpu.InterpretParams

    def run(self, packed: Array, scale: Array, group_size: int, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        return np.asarray(
            pallas_tpu.dequantize(
                jnp.asarray(packed), jnp.asarray(scale), group_size=group_size, dtype=dtype, interpret=self.interpret
            )
        )


class TestPallasGenericInterpreter(PallasConformance):
    """The kernel's arithmetic."""

    interpret = True

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        rows=st.integers(128, 300),
        group_size=st.sampled_from([8, 16, 24, 32, 64, 96, 128, 256]),
        groups=st.integers(1, 12),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_supported_shape(self, rows: int, group_size: int, groups: int, seed: int) -> None:
        """Shapes that nobody thought of."""
        groups = max(groups, -(-pallas_tpu.MIN_COLUMNS * 3 // group_size))
        case = Case(rows, group_size * groups, group_size)
        self.check(case, scale_dtype=BF16, dtype=BF16, kind="wild", seed=seed)


class TestPallasTpuInterpreter(PallasConformance):
    """The kernel's memory accesses: the interpreter simulates the TPU's memories and copies, and looks for races."""

    # Two cores divide the grid, copies happen as late as they may, and what was never written reads as NaN.
    interpret = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
    )
    # Fewer shapes than the other interpreter: this one takes seconds each.
    cases = PallasConformance.cases[:2]

    def run(self, packed: Array, scale: Array, group_size: int, dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        result = super().run(packed, scale, group_size, dtype)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found
        return result


# Block sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_real_shapes_are_supported(shape: shapes.Shape) -> None:
    assert pallas_tpu.supported(shape.rows, shape.columns, shape.group_size) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20000),
    group_size=st.one_of(st.sampled_from([16, 32, 64, 128, 256, 512, 1024]), st.integers(1, 9000)),
    groups=st.integers(1, 400),
)
def test_blocks_obey_the_constraints(rows: int, group_size: int, groups: int) -> None:
    columns = group_size * groups
    blocks = pallas_tpu.choose_blocks(rows, columns, group_size)
    if isinstance(blocks, str):
        assert blocks == pallas_tpu.supported(rows, columns, group_size)
        return
    assert pallas_tpu.supported(rows, columns, group_size) is None
    # Whole register tiles, not larger than the weight.
    assert blocks.rows % 128 == 0
    assert blocks.columns % 256 == 0
    assert 0 < blocks.rows <= rows
    assert 0 < blocks.columns <= columns
    assert blocks.rows * blocks.columns <= pallas_tpu.MAX_ELEMENTS
    # The scales of block k are exactly those that the map of blocks to scales selects.
    assert (blocks.columns // blocks.groups) % 8 == 0
    for k in range(-(-columns // blocks.columns)):
        last = min((k + 1) * blocks.columns, columns) - 1
        first_group = k // blocks.steps_per_scale * blocks.groups
        assert k * blocks.columns // group_size == first_group
        assert last // group_size < first_group + blocks.groups
        if blocks.groups > 1:
            assert blocks.columns == blocks.groups * group_size


# The entry point -----------------------------------------------------------------------------------------------------


def small(rows: int = 128, columns: int = 256, group_size: int = 32) -> tuple[jax.Array, jax.Array]:
    packed, scale = operands(batch=8, rows=rows, columns=columns, group_size=group_size, scale_dtype=BF16, kind="tame")
    return jnp.asarray(packed), jnp.asarray(scale)


def test_every_implementation_is_reachable_and_equal() -> None:
    packed, scale = small()
    expected = expect(np.asarray(packed), np.asarray(scale), 32, BF16)
    for implementation, interpret in (("auto", False), ("xla", False), ("pallas_tpu", True)):
        actual = jax.jit(
            lambda p, s, implementation=implementation, interpret=interpret: api.dequantize(
                p, s, group_size=32, dtype=BF16, implementation=implementation, interpret=interpret
            )
        )(packed, scale)
        expected.check(np.asarray(actual))


def test_auto_falls_back_where_the_kernel_does_not_apply() -> None:
    packed, scale = small(rows=127)
    actual = api.dequantize(packed, scale, group_size=32, dtype=BF16)
    expect(np.asarray(packed), np.asarray(scale), 32, BF16).check(np.asarray(actual))


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "sentence"),
    [
        (127, 256, 32, "smaller than one block"),
        (128, 254, 2, "smaller than one block"),
        (128, 512, 4, "not a multiple of 8"),
        (128, 544, 136, "a block of whole groups of 136 needs 4352 columns"),
    ],
)
def test_explicit_kernel_says_why_it_does_not_apply(rows: int, columns: int, group_size: int, sentence: str) -> None:
    packed, scale = small(rows, columns, group_size)
    with pytest.raises(ValueError, match=sentence):
        api.dequantize(packed, scale, group_size=group_size, dtype=BF16, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("packed", "scale", "group_size", "dtype", "sentence"),
    [
        (((2, 4), "uint8"), ((2, 1), "float32"), 8, "float32", "packed must be"),
        (((1, 2, 4), "int8"), ((1, 2, 1), "float32"), 8, "float32", "packed must be"),
        (((1, 2, 4), "uint8"), ((1, 2, 1), "int32"), 8, "float32", "scale must be bfloat16"),
        (((1, 2, 4), "uint8"), ((1, 2, 1), "float32"), 8, "float16", "dtype must be"),
        (((1, 2, 4), "uint8"), ((1, 2, 2), "float32"), 3, "float32", "does not divide"),
        (((1, 2, 4), "uint8"), ((1, 2, 2), "float32"), 8, "float32", "scale must have the shape"),
        (((1, 0, 4), "uint8"), ((1, 0, 1), "float32"), 8, "float32", "must not be empty"),
    ],
)
def test_bad_arguments(
    packed: tuple[tuple[int, ...], str], scale: tuple[tuple[int, ...], str], group_size: int, dtype: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        api.dequantize(jnp.zeros(*packed), jnp.zeros(*scale), group_size=group_size, dtype=dtype)


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="implementation must be one of"):
        api.dequantize(*small(), group_size=32, dtype=BF16, implementation="triton")  # type: ignore[arg-type]


def check_sharded_on_eight_devices() -> None:
    """Runs in a process of its own: the number of CPU devices is fixed when the backend starts."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    packed, scale = small()
    expected = expect(np.asarray(packed), np.asarray(scale), 32, BF16)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    axes: str | tuple[str, ...]
    for axes in (("a", "b"), "b"):
        sharding = NamedSharding(mesh, PartitionSpec(axes))
        arguments = (jax.device_put(packed, sharding), jax.device_put(scale, sharding))
        for implementation, interpret in (("auto", False), ("pallas_tpu", True)):
            local = functools.partial(
                api.dequantize,
                group_size=32,
                dtype=BF16,
                implementation=implementation,  # type: ignore[arg-type]
                interpret=interpret,
            )
            spec = PartitionSpec(axes)
            function = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
            compiled = jax.jit(function).lower(*arguments).compile()
            assert "all-gather" not in str(compiled.as_text())
            result = compiled(*arguments)
            assert result.sharding.is_equivalent_to(sharding, 3)
            expected.check(np.asarray(result))


def test_sharded_on_eight_devices() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(check_sharded_on_eight_devices)


def test_kernel_agrees_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    assert api.kernel_agrees(device, interpret=True)
    right = reference.dequantize

    def wrong_in_one_value(packed: jax.Array, scale: jax.Array, **settings: Any) -> jax.Array:
        return right(packed, scale, **settings).at[1, 2047, 1023].multiply(2)

    monkeypatch.setattr(reference, "dequantize", wrong_in_one_value)
    assert not api.kernel_agrees(device, interpret=True)
