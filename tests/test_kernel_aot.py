"""The TPU kernel compiles for every TPU generation at the shapes of real models. No TPU is needed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from slicecast.convert.codecs.pack_quantized import PackQuantizedInt4
from slicecast.convert.device import Step, program
from slicecast.convert.mapping.ops import Transpose
from slicecast.kernels import aot
from slicecast.kernels.int4_grouped import dequantize, pallas_tpu, shapes

MOSAIC = 'custom_call_target="tpu_custom_call"'

OTHER_BLOCKS = (
    shapes.Shape("other", "group 16", 1024, 2048, 16),
    shapes.Shape("other", "group 64", 1024, 2048, 64),
    shapes.Shape("other", "large groups", 1024, 6144, 768),
    shapes.Shape("other", "larger groups", 1024, 7680, 1280),
    shapes.Shape("other", "odd unit", 1024, 7200, 160),
    shapes.Shape("other", "ragged", 1000, 2880, 32),
)
"""Shapes of no particular model, which exercise the other choices of block sizes."""


def arguments(shape: shapes.Shape, *, batch: int, scale_dtype: DTypeLike = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((batch, shape.rows, shape.columns // 2), jnp.uint8),
        jax.ShapeDtypeStruct((batch, shape.rows, shape.columns // shape.group_size), scale_dtype),
    ]


def check(generation: str, shape: shapes.Shape, *, dtype: DTypeLike, scale_dtype: DTypeLike = jnp.bfloat16) -> int:
    """Compiles the entry point as the pipeline calls it, and returns the bytes of its temporaries."""
    function = functools.partial(dequantize, group_size=shape.group_size, dtype=dtype)
    compiled = aot.compile_for(generation, function, *arguments(shape, batch=2, scale_dtype=scale_dtype))
    assert MOSAIC in str(compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory is not None
    return int(memory.temp_size_in_bytes)


def bytes_of_scales(shape: shapes.Shape) -> int:
    """What `check` allows: the transposed float32 scales, and 64 KiB of small things."""
    return 4 * 2 * shape.rows * shape.columns // shape.group_size + 64 * 1024


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("shape", shapes.ALL, ids=str)
def test_real_shapes(generation: str, shape: shapes.Shape) -> None:
    assert check(generation, shape, dtype=jnp.bfloat16) <= bytes_of_scales(shape)


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("shape", OTHER_BLOCKS, ids=str)
def test_other_blocks(generation: str, shape: shapes.Shape) -> None:
    # No bound on memory. XLA stores a weight whose sides are not multiples of a tile in the order that wastes less, and
    # that is not always the order the kernel writes.
    check(generation, shape, dtype=jnp.float32)


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.float32])
def test_other_scales(generation: str, scale_dtype: DTypeLike) -> None:
    shape = shapes.KIMI_K2[0]
    assert check(generation, shape, dtype=jnp.bfloat16, scale_dtype=scale_dtype) <= bytes_of_scales(shape)


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("over_rows", [1, 2])
def test_the_program_of_a_conversion_uses_the_kernel_and_communicates_nothing(generation: str, over_rows: int) -> None:
    shape = shapes.KIMI_K2[0]
    step = Step(
        codec=PackQuantizedInt4(shape.columns, shape.group_size),
        ops=(Transpose(),),
        source=(shape.rows, shape.columns),
        element=(shape.columns, shape.rows),
        row_axis=1,
        dtype="bfloat16",
    )
    mesh = Mesh(np.array(aot.devices(generation)).reshape(-1, over_rows), ("batch", "rows"))
    sharding = NamedSharding(mesh, PartitionSpec("batch", "rows"))
    operands = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments(shape, batch=2 * mesh.size)
    ]
    text = str(program(step, mesh).lower(*operands).compile().as_text())
    assert MOSAIC in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_the_compiler_refuses_blocks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Shows that the tests above would fail if the blocks were too large: VMEM really is checked.
    monkeypatch.setattr(pallas_tpu, "MAX_ELEMENTS", 8 * pallas_tpu.MAX_ELEMENTS)
    monkeypatch.setattr(pallas_tpu, "TARGET_COLUMNS", 2 * pallas_tpu.TARGET_COLUMNS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        check("v5e", shapes.KIMI_K2[0], dtype=jnp.float32)
