"""What is particular to the TPU kernels of GPTQ and AWQ, compiled for every generation; real shapes are elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.typing import DTypeLike

from slicecast.kernels import affine, aot, gptq
from slicecast.kernels.awq import shapes as awq_shapes
from slicecast.kernels.gptq import shapes as gptq_shapes

pytestmark = pytest.mark.kernel

Shape = awq_shapes.Shape | gptq_shapes.Shape

BATCH = 2

OTHER: tuple[Shape, ...] = (
    gptq_shapes.Shape("other", "2 bits", 4096, 4096, 2, 128),
    gptq_shapes.Shape("other", "group 16", 4096, 1024, 4, 16),
    gptq_shapes.Shape("other", "group 32", 4096, 1024, 4, 32),
    gptq_shapes.Shape("other", "group 96", 4096, 1024, 8, 96),
    gptq_shapes.Shape("other", "large groups", 7680, 1024, 4, 1280),
    gptq_shapes.Shape("other", "ragged", 2080, 1000, 4, 128),
    gptq_shapes.Shape("other", "narrow", 4096, 128, 4, 128),
    gptq_shapes.Shape("other", "less than a block", 64, 72, 8, 128),
    awq_shapes.Shape("other", "group 16", 4096, 1024, 16),
    awq_shapes.Shape("other", "group 32", 4096, 1024, 32),
    awq_shapes.Shape("other", "group 96", 4096, 2048, 96),
    awq_shapes.Shape("other", "large groups", 7680, 1024, 1280),
    awq_shapes.Shape("other", "one group", 2048, 1024, 2048),
    awq_shapes.Shape("other", "ragged", 2083, 1000, 128),
    awq_shapes.Shape("other", "less than a block", 60, 72, 128),
)
"""Shapes of no particular model, which exercise the other choices of block sizes."""


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("shape", OTHER, ids=lambda shape: f"{type(shape).__module__.split('.')[2]} {shape}")
def test_other_blocks(generation: str, shape: Shape) -> None:
    measured = aot.measure(generation, shape.function("auto"), *shape.operands(BATCH))
    assert len(measured.kernels) == 1


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_other_dtypes(generation: str, scale_dtype: DTypeLike, dtype: DTypeLike) -> None:
    shape: Shape
    for shape in (gptq_shapes.QWEN_2_5_72B[2], awq_shapes.QWEN_2_5_72B[2]):
        words, scale, zero = shape.operands(BATCH)
        scale = jax.ShapeDtypeStruct(scale.shape, scale_dtype)
        measured = aot.measure(generation, shape.function("auto", dtype), words, scale, zero)
        assert len(measured.kernels) == 1


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
def test_words_that_are_not_padded_are_copied(generation: str) -> None:
    # Why there is `padded_words`.
    shape = awq_shapes.QWEN_2_5_72B[0]
    words, scale, zero = shape.operands(BATCH)
    bare = jax.ShapeDtypeStruct((*words.shape[:2], shape.columns // 8), words.dtype)
    assert bare.shape != words.shape
    compiled = aot.compile_for(generation, shape.function("auto"), bare, scale, zero)
    assert aot.bytes_moved(compiled) > 1.3 * shape.floor_bytes(BATCH)


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
def test_group_index(generation: str) -> None:
    shape = dataclasses.replace(gptq_shapes.QWEN_2_5_72B[3], rows=1024)
    group_index = jax.ShapeDtypeStruct((BATCH, shape.rows), jnp.int32)

    def function(words: jax.Array, scale: jax.Array, zero: jax.Array, group_index: jax.Array) -> jax.Array:
        return gptq.dequantize(words, scale, zero, bits=4, group_size=128, dtype=jnp.bfloat16, group_index=group_index)

    compiled = aot.compile_for(generation, function, *shape.operands(BATCH), group_index)
    memory = compiled.memory_analysis()
    assert memory is not None
    # A scale of 2 bytes and a zero of 1 byte for each element, and small things.
    assert memory.temp_size_in_bytes <= 3 * BATCH * shape.rows * shape.columns + 256 * 1024


@pytest.mark.parametrize("shape", [gptq_shapes.QWEN_2_5_72B[0], awq_shapes.QWEN_2_5_72B[0]], ids=["gptq", "awq"])
def test_the_compiler_refuses_blocks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    # Shows that these tests would fail if the blocks were too large: VMEM really is checked.
    monkeypatch.setattr(affine, "MAX_ELEMENTS", 8 * affine.MAX_ELEMENTS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        aot.compile_for("v5e", shape.function("auto"), *shape.operands(BATCH))
