"""The grouped kernel's entry point, its choice of blocks, and what it reads."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_weights import BF16, F32, U8, Case, Weight, random
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slicecast.kernels.grouped import Code, api, pallas_tpu, reference, shapes
from slicecast.kernels.implementation import Implementation

pytestmark = pytest.mark.kernel

# Block sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_real_shapes_are_supported(shape: shapes.Shape) -> None:
    codes, scale, *rest = shape.operands(batch=1)
    assert pallas_tpu.unsupported(codes, scale, shape.code, shape.group_size, rest[0] if shape.zero else None) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20000),
    group_size=st.one_of(st.sampled_from([8, 16, 32, 64, 128, 256, 512, 1024]), st.integers(1, 9000)),
    groups=st.integers(1, 400),
    bits=st.sampled_from([4, 8]),
    sublanes=st.sampled_from([8, 16, 32]),
)
def test_blocks_obey_the_constraints(rows: int, group_size: int, groups: int, bits: int, sublanes: int) -> None:
    blocks = pallas_tpu.choose_blocks(rows, group_size * groups, group_size, bits=bits, sublanes=sublanes)
    if isinstance(blocks, str):
        assert groups > 1
        return
    # Whole register tiles, and never a whole block beyond the weight.
    assert blocks.rows % 128 == 0
    assert blocks.columns * bits // 8 % 128 == 0
    assert 0 < blocks.rows < rows + 128
    assert blocks.rows * blocks.columns <= pallas_tpu.MAX_ELEMENTS
    # A block of scales is whole register tiles, or all there are, and a column block's are exactly its groups.
    assert blocks.groups % sublanes == 0 or blocks.groups == groups
    if groups > 1:
        assert blocks.columns == blocks.groups * group_size or blocks.groups == groups <= sublanes
    # A piece is whole groups, or lies within one.
    piece = pallas_tpu.PIECE_BYTES * 8 // bits
    assert groups == 1 or group_size % piece == 0 or (piece % group_size == 0 and group_size % 8 == 0)


REREAD = (
    shapes.Shape("other", "ragged", 1000, 4000, "int4_offset", 32, zero=True),
    shapes.Shape("other", "ragged", 1000, 4000, "e4m3", 4000),
    shapes.DEEPSEEK_R1_NVFP4[0],
    shapes.DEEPSEEK_V3[6],
    shapes.GPT_OSS_120B[1],
)


@pytest.mark.parametrize("shape", REREAD, ids=str)
def test_nothing_is_read_or_written_twice(shape: shapes.Shape) -> None:
    """What `aot.bytes_moved` supposes: each block of an operand, or of the result, is copied once."""
    call = kernel_call(jax.make_jaxpr(shape.function("pallas_tpu"))(*shape.operands(batch=2)).jaxpr)
    mapping = call.params["grid_mapping"]
    for block in mapping.block_mappings:
        index_map = functools.partial(jax.core.eval_jaxpr, block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts)
        visits = [tuple(map(int, index_map(*step))) for step in itertools.product(*map(range, mapping.grid))]
        copies = [index for index, _ in itertools.groupby(visits)]
        assert len(copies) == len(set(copies))
        sizes = [getattr(size, "block_size", size) for size in block.block_shape]
        blocks = [-(-extent // size) for extent, size in zip(block.array_aval.shape, sizes, strict=True)]
        assert len(copies) == np.prod(blocks)


def kernel_call(jaxpr: Any) -> Any:
    """The equation of the only Pallas kernel in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            return equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            if (found := kernel_call(inner)) is not None:
                return found
    return None


# The choice of an implementation -------------------------------------------------------------------------------------


def dequantize(weight: Weight, **how: Any) -> np.ndarray:
    """The result of the entry point within a program."""
    arrays = {name: value for name, value in weight.keywords().items() if isinstance(value, jax.Array)}
    settings = {name: value for name, value in weight.keywords().items() if name not in arrays}
    return np.asarray(jax.jit(functools.partial(api.dequantize, **settings, **how))(**arrays))


@pytest.mark.parametrize(("implementation", "interpret"), [("auto", False), ("xla", False), ("pallas_tpu", True)])
def test_every_implementation_is_reachable(implementation: Implementation, interpret: bool) -> None:
    weight = random("e2m1", "e4m3", U8, Case(128, 256, 16, batch=2))
    weight.check(dequantize(weight, dtype=BF16, implementation=implementation, interpret=interpret))
    weight = random("int8", "float", BF16, Case(128, 256, 32, batch=2), zero=True)
    weight.check(dequantize(weight, dtype=F32, implementation=implementation, interpret=interpret))


def test_auto_falls_back_where_the_kernel_does_not_apply() -> None:
    weight = random("int4_offset", "float", BF16, Case(8, 96, 12))
    weight.check(dequantize(weight, dtype=BF16))


@pytest.mark.parametrize(
    ("code", "columns", "group_size", "sentence"),
    [
        ("int4_offset", 512, 4, "neither a multiple of 64 nor"),
        ("int4_offset", 960, 96, "neither a multiple of 64 nor"),
        ("int8", 512, 4, "neither a multiple of 32 nor"),
        ("int8", 1024 * 40, 1024, "needs 16384 columns"),
    ],
)
def test_explicit_kernel_says_why_it_does_not_apply(code: Code, columns: int, group_size: int, sentence: str) -> None:
    weight = random(code, "float", BF16, Case(8, columns, group_size))
    with pytest.raises(ValueError, match=sentence):
        dequantize(weight, dtype=BF16, implementation="pallas_tpu")


def test_kernel_agrees_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    assert api.kernel_agrees(device, interpret=True)
    right = reference.dequantize

    def wrong_in_one_value(codes: jax.Array, scale: jax.Array, **settings: Any) -> jax.Array:
        y = right(codes, scale, **settings)
        return y.at[1, -1, -1].set(3) if settings["code"] == "e5m2" else y

    monkeypatch.setattr(reference, "dequantize", wrong_in_one_value)
    assert not api.kernel_agrees(device, interpret=True)


# Bad arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"codes": ((2, 4), "uint8")}, "codes must be"),
        ({"codes": ((1, 2, 4), "int8")}, "codes must be"),
        ({"codes": ((1, 0, 4), "uint8")}, "must not be empty"),
        ({"scale": ((1, 2, 1), "int32")}, "scale must be bfloat16"),
        ({"scale": ((1, 2, 2), "float32")}, "scale must have the shape"),
        ({"scale_format": "e8m0"}, "scale must be uint8"),
        ({"scale_format": "e5m2"}, "scale_format must be one of"),
        ({"code": "uint4"}, "code must be one of"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"group_size": 3}, "does not divide"),
        ({"group_size": 0}, "does not divide"),
        ({"zero": ((1, 2, 1), "uint8")}, "zero must be int8"),
        ({"zero": ((1, 2, 2), "int8")}, "zero must be int8"),
        ({"zero": ((1, 2, 1), "int8"), "code": "e2m1"}, "zero goes with"),
        ({"significands": ((1, 16), "float32")}, "significands go with"),
        ({"scale_format": "e4m3", "scale": ((1, 2, 1), "uint8")}, "significands go with"),
        (
            {"scale_format": "e4m3", "scale": ((1, 2, 1), "uint8"), "significands": ((2, 16), "float32")},
            "significands must be",
        ),
        ({"implementation": "triton"}, "implementation must be one of"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "codes": ((1, 2, 4), "uint8"),
        "scale": ((1, 2, 1), "float32"),
        "code": "int4_offset",
        "group_size": 8,
        "dtype": "float32",
    }

    def call(arguments: dict[str, Any]) -> jax.Array:
        return api.dequantize(**{k: jnp.zeros(*v) if isinstance(v, tuple) else v for k, v in arguments.items()})

    assert call(arguments).shape == (1, 8, 2)
    with pytest.raises(ValueError, match=sentence):
        call({**arguments, **changed})


# Several devices -----------------------------------------------------------------------------------------------------


def check_sharded_on_eight_devices() -> None:
    """Runs in a process of its own: the number of CPU devices is fixed when the backend starts."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    weight = random("int4_offset", "float", BF16, Case(128, 256, 32, batch=8), zero=True)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def local(codes: jax.Array, scale: jax.Array, zero: jax.Array, **how: Any) -> jax.Array:
        return api.dequantize(codes, scale, zero=zero, code="int4_offset", group_size=32, dtype=BF16, **how)

    hows = ({"implementation": "auto"}, {"implementation": "pallas_tpu", "interpret": True})
    for axes, how in itertools.product((("a", "b"), "b"), hows):
        spec = PartitionSpec(axes)
        sharding = NamedSharding(mesh, spec)
        mapped = functools.partial(local, **how)
        function = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        operands = jax.device_put((weight.codes, weight.scale, weight.zero), sharding)
        compiled = function.lower(*operands).compile()
        assert "all-gather" not in str(compiled.as_text())
        result = compiled(*operands)
        assert result.sharding.is_equivalent_to(sharding, 3)
        weight.check(np.asarray(result))


def test_sharded_on_eight_devices() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(check_sharded_on_eight_devices)
