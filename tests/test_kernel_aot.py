"""The TPU kernels compile for every TPU generation at the shapes of real models, and move little. No TPU is needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from slicecast.convert.codecs.grouped import Grouped
from slicecast.convert.device import Step, program
from slicecast.convert.mapping.ops import Transpose
from slicecast.kernels import aot
from slicecast.kernels.awq import shapes as awq
from slicecast.kernels.gptq import shapes as gptq
from slicecast.kernels.grouped import ScaleFormat, pallas_tpu
from slicecast.kernels.grouped import shapes as grouped

pytestmark = pytest.mark.kernel

BOUND = 1.1
"""How many times the bytes that must move a program may move."""

BATCH = 2
"""Weights in a program, so that the batch axis is one."""

SPILLS_ON_V4 = 24
"""What the kernels for GPTQ and AWQ spill there, at most. All others spill nothing."""

OTHER = (
    grouped.Shape("other", "group 8", 1024, 2048, "int8", 8),
    grouped.Shape("other", "group 16", 1024, 2048, "int4_offset", 16, zero=True),
    grouped.Shape("other", "group 64", 1024, 2048, "e2m1", 64),
    grouped.Shape("other", "large groups", 1024, 3072, "e4m3", 768),
    grouped.Shape("other", "few groups", 1024, 3840, "e5m2", 1280),
    grouped.Shape("other", "odd groups", 1024, 7200, "int8_offset", 160),
    grouped.Shape("other", "ragged", 1000, 2880, "int4_offset", 32, zero=True),
)
"""Weights of no particular model, which exercise the other choices of blocks."""


def measure(generation: str, shape: Any, **dtype: Any) -> aot.Measurement:
    """What the compiler says about the entry point as the pipeline calls it."""
    measured = aot.measure(generation, shape.function("auto", **dtype), *shape.operands(BATCH))
    assert len(measured.kernels) == 1
    return measured


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("shape", grouped.ALL + gptq.ALL + awq.ALL, ids=str)
def test_real_shapes(generation: str, shape: Any) -> None:
    measured = measure(generation, shape)
    assert aot.bytes_moved(measured.compiled) <= BOUND * shape.floor_bytes(BATCH)
    assert measured.spills <= (0 if isinstance(shape, grouped.Shape) or generation != "v4" else SPILLS_ON_V4)


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("shape", OTHER, ids=str)
def test_other_blocks_and_float32(generation: str, shape: grouped.Shape) -> None:
    # No bound on the bytes: with such sides, tiles of memory are partly empty.
    assert measure(generation, shape, dtype=jnp.float32).spills == 0


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
def test_weights_smaller_than_a_tile(generation: str) -> None:
    measure(generation, grouped.Shape("other", "small", 1, 64, "e4m3", 32))


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize(
    ("scale_format", "scale_dtype"),
    [("float", jnp.float16), ("float", jnp.float32), ("e8m0", jnp.uint8), ("e4m3", jnp.uint8)],
)
def test_other_scales(generation: str, scale_format: ScaleFormat, scale_dtype: DTypeLike) -> None:
    shape = grouped.Shape("other", "scales", 2048, 7168, "int4_offset", 32, scale_format, scale_dtype)
    measured = measure(generation, shape)
    assert aot.bytes_moved(measured.compiled) <= BOUND * shape.floor_bytes(BATCH)
    assert measured.spills == 0


# The program of a conversion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize("over_rows", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [grouped.KIMI_K2[0], grouped.DEEPSEEK_V3[6], grouped.GPT_OSS_120B[1], grouped.DEEPSEEK_R1_NVFP4[1]],
    ids=str,
)
def test_a_conversion_uses_the_kernel_and_communicates_nothing(
    generation: str, over_rows: int, shape: grouped.Shape
) -> None:
    step = Step(
        codec=Grouped(
            description="",
            code=shape.code,
            out=shape.rows,
            columns=shape.columns,
            group_size=shape.group_size,
            scale_format=shape.scale_format,
            rows_per_scale=shape.rows_per_scale,
            global_scale="divide" if shape.scale_format == "e4m3" else None,
        ),
        ops=(Transpose(),),
        source=(shape.rows, shape.columns),
        element=(shape.columns, shape.rows),
        row_axis=1,
        dtype="bfloat16",
    )
    mesh = Mesh(np.array(aot.devices(generation)).reshape(-1, over_rows), ("batch", "rows"))
    batch = BATCH * mesh.size
    operands = [
        jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=NamedSharding(mesh, step.spec(i)))
        for i, operand in enumerate(shape.operands(batch))
    ]
    compiled = program(step, mesh, len(operands)).lower(*operands).compile()
    text = str(compiled.as_text())
    assert "grouped_dequantize" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    assert mesh.size * aot.bytes_moved(compiled) <= BOUND * shape.floor_bytes(batch)


# What the tests above would notice -----------------------------------------------------------------------------------


def test_blocks_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "MAX_ELEMENTS", 8 * pallas_tpu.MAX_ELEMENTS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        measure("v5e", grouped.KIMI_K2[0], dtype=jnp.float32)


def test_spills_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "INTERLEAVED_COLUMNS", 1024)
    assert measure("v4", grouped.GPT_OSS_120B[0]).spills > 0


def test_copies_and_tiles_are_counted() -> None:
    shape = grouped.Shape("other", "copied", 512, 512, "int8", 512 // 8)
    operands = shape.operands(BATCH)
    kernel = shape.function("pallas_tpu")
    alone = aot.bytes_moved(aot.compile_for("v5e", kernel, *operands))
    assert alone == shape.floor_bytes(BATCH)
    # The kernel's result is no longer the program's, which reads it and writes another.
    copied = aot.compile_for("v5e", lambda *operands: -kernel(*operands), *operands)
    assert aot.bytes_moved(copied) == alone + 2 * BATCH * 512 * 512 * 2
    # Bytes are stored in tiles of [8, 128] or larger.
    narrow = aot.compile_for("v5e", lambda x: x + 1, jax.ShapeDtypeStruct((9, 130), jnp.uint8))
    assert aot.bytes_moved(narrow) == 2 * 16 * 256


def test_loops_are_not_guessed_at() -> None:
    shape = grouped.KIMI_K2[0]
    with pytest.raises(ValueError, match="while"):
        aot.bytes_moved(aot.compile_for("v5e", shape.function("xla"), *shape.operands(BATCH)))
