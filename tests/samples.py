"""A weight in every format, with random contents: small checkpoints for tests that need them all.

The contents are valid, whatever the codes: scales are ordinary, and what partners say of each other is true.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published
import stored
from safetensors.numpy import load_file

Array = np.ndarray

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS: dict[str, Any] = {"BF16": BF16, "F16": np.float16, "F32": np.float32}

# Of the logical tensor, except where a test or a format wants another: rows that fill no blocks, several groups.
OUT, COLUMNS = 24, 64
EXPERTS = 4


@dataclass(frozen=True)
class Sample:
    """A checkpoint with one logical tensor.

    Attributes:
        name: The name of the logical tensor.
        shape: Its shape.
        tensors: What is stored, as `stored.write` takes it.
        config: The content of `config.json`.
    """

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, tuple[str, Array]]
    config: Mapping[str, Any]

    def write(self, directory: Path) -> Path:
        """Writes the checkpoint; returns its directory."""
        return stored.write(directory, self.tensors, self.config)

    def replaced(self, **tensors: tuple[str, Array]) -> "Sample":
        """The same with other stored tensors, by the last parts of their names: `m.weight` ends in `weight`."""
        full = {name: name for name in self.tensors}
        for suffix in tensors:
            (full[suffix],) = (name for name in self.tensors if name.endswith(suffix))
        return replace(self, tensors={**self.tensors, **{full[suffix]: found for suffix, found in tensors.items()}})


def random_scale(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "F32") -> Array:
    """Scales as weights of a model have them: floats, E4M3, or the bits of E8M0."""
    if dtype in FLOATS:
        return rng.uniform(0.001, 0.02, shape).astype(FLOATS[dtype])
    if dtype == "F8_E4M3":
        return rng.uniform(1, 448, shape).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return rng.integers(100, 140, shape, np.uint8)


def random_bytes(rng: np.random.Generator, *shape: int) -> Array:
    """Bytes of all values."""
    return rng.integers(0, 256, shape, np.uint8)


def random_words(rng: np.random.Generator, *shape: int) -> Array:
    """32-bit words of all values."""
    return rng.integers(-(2**31), 2**31, shape, np.int32)


def _quantized(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantization_config": config}


def float8(
    rng: np.random.Generator,
    scale_shape: tuple[int, ...],
    *,
    code: str = "F8_E4M3",
    scale: str = "F32",
    partner: str = "weight_scale_inv",
    config: Mapping[str, Any],
) -> Sample:
    """FP8 with scales of any shape."""
    tensors = {
        "m.weight": (code, random_bytes(rng, OUT, COLUMNS)),
        f"m.{partner}": (scale, random_scale(rng, scale_shape, scale)),
    }
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(config))


def int8(rng: np.random.Generator) -> Sample:
    """INT8 with a scale and a zero point a row."""
    tensors = {
        "m.weight": ("I8", random_bytes(rng, OUT, COLUMNS).view(np.int8)),
        "m.weight_scale": ("BF16", random_scale(rng, (OUT, 1), "BF16")),
        "m.weight_zero_point": ("I8", random_bytes(rng, OUT, 1).view(np.int8)),
    }
    config = published.compressed_tensors("int-quantized", num_bits=8, strategy="channel", symmetric=False)
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(config))


def packed_integers(rng: np.random.Generator, bits: int, *, symmetric: bool) -> Sample:
    """compressed-tensors' packed integers, dense, in groups of 32."""
    groups = COLUMNS // 32
    tensors = {
        "m.weight_packed": ("I32", random_words(rng, OUT, -(-COLUMNS * bits // 32))),
        "m.weight_scale": ("BF16", random_scale(rng, (OUT, groups), "BF16")),
        "m.weight_shape": ("I32", np.array([OUT, COLUMNS], np.int32)),
    }
    if not symmetric:
        tensors["m.weight_zero_point"] = ("I32", random_words(rng, -(-OUT * bits // 32), groups))
    config = published.compressed_tensors(
        "pack-quantized", num_bits=bits, group_size=32, strategy="group", symmetric=symmetric
    )
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(config))


def gpt_oss(rng: np.random.Generator) -> Sample:
    """MXFP4 as in gpt-oss: several experts in a tensor, transposed."""
    groups = COLUMNS // 32
    tensors = {
        "m.gate_up_proj_blocks": ("U8", random_bytes(rng, EXPERTS, OUT, groups, 16)),
        "m.gate_up_proj_scales": ("U8", random_scale(rng, (EXPERTS, OUT, groups), "U8")),
    }
    return Sample("m.gate_up_proj", (EXPERTS, COLUMNS, OUT), tensors, _quantized(published.GPT_OSS))


def mxfp4(rng: np.random.Generator, *, code: str, weight: str, partner: str, scale: str) -> Sample:
    """MXFP4 under the names of compressed-tensors, DeepSeek-V4 or MiMo."""
    tensors = {
        f"m.{weight}": (code, random_bytes(rng, OUT, COLUMNS // 2)),
        f"m.{partner}": (scale, random_scale(rng, (OUT, COLUMNS // 32), scale)),
    }
    config = published.compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32)
    return Sample(
        "m.weight", (OUT, COLUMNS), tensors, _quantized(config if weight == "weight_packed" else published.MIMO)
    )


def nvfp4(rng: np.random.Generator, *, modelopt: bool) -> Sample:
    """NVFP4 of ModelOpt or compressed-tensors."""
    weight, factor = ("weight", "weight_scale_2") if modelopt else ("weight_packed", "weight_global_scale")
    tensors = {
        f"m.{weight}": ("U8", random_bytes(rng, OUT, COLUMNS // 2)),
        "m.weight_scale": ("F8_E4M3", random_scale(rng, (OUT, COLUMNS // 16), "F8_E4M3")),
        f"m.{factor}": ("F32", np.array(0.0123, np.float32) if modelopt else np.array([1792.1], np.float32)),
    }
    if modelopt:
        config = published.modelopt("NVFP4", num_bits=4, type="float", group_size=16)
    else:
        config = published.compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(config))


def gptq(rng: np.random.Generator, bits: int, version: int, *, desc_act: bool) -> Sample:
    """GPTQ in groups of 32; with `desc_act` the inputs are out of order."""
    groups = COLUMNS // 32
    tensors = {
        "m.qweight": ("I32", random_words(rng, COLUMNS * bits // 32, OUT)),
        "m.qzeros": ("I32", random_words(rng, groups, OUT * bits // 32)),
        "m.scales": ("F16", random_scale(rng, (groups, OUT), "F16")),
    }
    if desc_act:
        tensors["m.g_idx"] = ("I32", rng.permutation(np.arange(COLUMNS, dtype=np.int32) // 32))
    layout = "gptq" if version == 1 else "gptq_v2"
    config = published.gptq(bits, 32, desc_act=desc_act, checkpoint_format=layout)
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(config))


def awq(rng: np.random.Generator) -> Sample:
    """AWQ in groups of 32."""
    groups = COLUMNS // 32
    tensors = {
        "m.qweight": ("I32", random_words(rng, COLUMNS, OUT // 8)),
        "m.qzeros": ("I32", random_words(rng, groups, OUT // 8)),
        "m.scales": ("F16", random_scale(rng, (groups, OUT), "F16")),
    }
    return Sample("m.weight", (OUT, COLUMNS), tensors, _quantized(published.awq(32)))


def state(**fields: Any) -> tuple[str, Array]:
    """The stored state of a bitsandbytes weight."""
    return "U8", np.frombuffer(json.dumps(fields).encode(), np.uint8)


def bitsandbytes(
    rng: np.random.Generator,
    *,
    nested: bool,
    kind: str = "nf4",
    shape: tuple[int, int] = (OUT, COLUMNS),
    block: int = 64,
) -> Sample:
    """NF4 or FP4. The map is sorted, as theirs are, but not theirs: the stored one counts."""
    values = shape[0] * shape[1]
    blocks = -(-values // block)
    fields: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {
        "m.weight": ("U8", random_bytes(rng, -(-values // 2), 1)),
        "m.weight.absmax": ("F32", random_scale(rng, (blocks,))),
        "m.weight.quant_map": ("F32", np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)),
    }
    if nested:
        tensors |= {
            "m.weight.absmax": ("U8", random_bytes(rng, blocks)),
            "m.weight.nested_quant_map": ("F32", np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)),
            "m.weight.nested_absmax": ("F32", random_scale(rng, (-(-blocks // 256),))),
        }
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0522}
    tensors[f"m.weight.quant_state.bitsandbytes__{kind}"] = state(**fields)
    return Sample("m.weight", shape, tensors, _quantized(published.bitsandbytes(kind, nested=nested)))


def mlx(rng: np.random.Generator, bits: int) -> Sample:
    """MLX's affine integers in groups of 32."""
    groups = COLUMNS // 32
    tensors = {
        "m.weight": ("U32", random_words(rng, OUT, COLUMNS * bits // 32).view(np.uint32)),
        "m.scales": ("BF16", random_scale(rng, (OUT, groups), "BF16")),
        "m.biases": ("BF16", -random_scale(rng, (OUT, groups), "BF16")),
    }
    return Sample("m.weight", (OUT, COLUMNS), tensors, {"quantization": published.mlx(bits, 32)})


def plain(rng: np.random.Generator, dtype: str) -> Sample:
    """Plain numbers."""
    values = rng.standard_normal((OUT, COLUMNS)).astype(FLOATS[dtype])
    return Sample("m.weight", (OUT, COLUMNS), {"m.weight": (dtype, values)}, {})


_CHANNEL = published.compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel")

MAKERS: dict[str, Callable[[np.random.Generator], Sample]] = {
    "bf16": lambda rng: plain(rng, "BF16"),
    "f32": lambda rng: plain(rng, "F32"),
    "fp8 blocks": lambda rng: float8(rng, (2, 4), config=published.fp8_blocks((16, 16))),
    "fp8 blocks ue8m0": lambda rng: float8(
        rng, (2, 4), scale="F8_E8M0", partner="scale", config=published.fp8_blocks((16, 16), scale_fmt="ue8m0")
    ),
    "fp8 a row": lambda rng: float8(rng, (OUT, 1), scale="BF16", partner="weight_scale", config=_CHANNEL),
    "fp8 a tensor": lambda rng: float8(rng, (), partner="weight_scale", config=published.FP8_PER_TENSOR),
    "fp8 e5m2": lambda rng: float8(rng, (OUT,), code="F8_E5M2", partner="weight_scale", config=published.FBGEMM_FP8),
    "mxfp8": lambda rng: float8(rng, (OUT, COLUMNS // 32), scale="U8", config=published.MXFP8),
    "int8 asymmetric": int8,
    "int4": lambda rng: packed_integers(rng, 4, symmetric=True),
    "int4 asymmetric": lambda rng: packed_integers(rng, 4, symmetric=False),
    "int8 packed asymmetric": lambda rng: packed_integers(rng, 8, symmetric=False),
    "int3": lambda rng: packed_integers(rng, 3, symmetric=True),
    "int6 asymmetric": lambda rng: packed_integers(rng, 6, symmetric=False),
    "mxfp4 gpt-oss": gpt_oss,
    "mxfp4 packed": lambda rng: mxfp4(rng, code="U8", weight="weight_packed", partner="weight_scale", scale="U8"),
    "mxfp4 i8": lambda rng: mxfp4(rng, code="I8", weight="weight", partner="scale", scale="F8_E8M0"),
    "mxfp4 f4": lambda rng: mxfp4(rng, code="F4", weight="weight", partner="scale", scale="F8_E8M0"),
    "mxfp4 u8": lambda rng: mxfp4(rng, code="U8", weight="weight", partner="weight_scale", scale="U8"),
    "nvfp4": lambda rng: nvfp4(rng, modelopt=False),
    "nvfp4 modelopt": lambda rng: nvfp4(rng, modelopt=True),
    "gptq v1": lambda rng: gptq(rng, 4, 1, desc_act=False),
    "gptq v2": lambda rng: gptq(rng, 8, 2, desc_act=False),
    "gptq desc_act": lambda rng: gptq(rng, 4, 1, desc_act=True),
    "awq": awq,
    "bnb nf4": lambda rng: bitsandbytes(rng, nested=False),
    "bnb nested": lambda rng: bitsandbytes(rng, nested=True),
    "mlx": lambda rng: mlx(rng, 4),
}
"""Every format, by a name for test ids."""

SAMPLES: dict[str, Sample] = {name: make(np.random.default_rng(i)) for i, (name, make) in enumerate(MAKERS.items())}
"""A checkpoint of each. Not to be changed."""

QUANTIZED = {name: sample for name, sample in SAMPLES.items() if name not in ("bf16", "f32")}
"""Those whose values follow from several stored tensors."""


def assert_same(found: Array, wanted: Array) -> None:
    """Checks that numbers are the same, bit for bit.

    A NaN may have any payload, and a computed result below 2**-126 may have become a zero of the same sign.
    """
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    same = found.view(f"u{found.itemsize}") == np.ascontiguousarray(wanted).view(f"u{found.itemsize}")
    same |= np.isnan(found) & np.isnan(wanted)
    small = np.abs(wanted.astype(np.float32)) < 2.0**-126
    same |= (found == 0) & small & (np.signbit(found) == np.signbit(wanted))
    different = np.argwhere(~same)
    assert not len(different), f"{len(different)} differ; {different[0]}: {found[~same][0]!r}, {wanted[~same][0]!r}"


def assert_decodes(directory: Path, name: str, shape: tuple[int, ...], wanted: Array | None = None) -> None:
    """Checks a stored tensor through the codec, and through the definition that `verify` uses, against each other.

    Args:
        directory: The checkpoint.
        name: The logical tensor.
        shape: Its shape.
        wanted: What both must give, float32 and not rounded; None if it is enough that they agree.
    """
    defined = stored.expected(directory, name, shape)
    if wanted is not None:
        numbers = ~np.isnan(wanted)
        assert np.array_equal(defined.view(np.uint32)[numbers], wanted.view(np.uint32)[numbers])
        assert np.isnan(defined[~numbers]).all()
    values = defined.astype(np.float32)
    assert_same(stored.decode(directory, name, shape, dtype="float32"), values)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(BF16)
    assert_same(stored.decode(directory, name, shape, transposed=True), np.ascontiguousarray(rounded.swapaxes(-1, -2)))


def in_a_llama(
    llama: Path, name: str, directory: Path, *, spoil: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Writes a copy of a small Llama in which the gate and up projections are stored in a format.

    Args:
        llama: A checkpoint with projections of `OUT` x `COLUMNS`: `make_checkpoint(**LLAMA)`.
        name: The format.
        directory: Where the copy is written.
        spoil: Changes the stored tensors in place, by name, as (dtype, array).

    Returns:
        The directory.
    """
    tensors: dict[str, Any] = {}
    for file in sorted(llama.glob("*.safetensors")):
        tensors |= {key: ("BF16", array) for key, array in load_file(file).items()}
    weights = [key for key in tensors if key.endswith((".gate_proj.weight", ".up_proj.weight"))]
    for i, weight in enumerate(weights):
        assert tensors.pop(weight)[1].shape == (OUT, COLUMNS)
        sample = MAKERS[name](np.random.default_rng(i))
        module = weight.removesuffix("weight")
        tensors |= {module + key.removeprefix("m."): content for key, content in sample.tensors.items()}
    if spoil is not None:
        spoil(tensors)
    config = json.loads((llama / "config.json").read_text())
    return stored.write(directory, tensors, config | SAMPLES[name].config)


LLAMA: dict[str, Any] = {
    "family": "llama",
    "files": 1,
    "layers": 2,
    "hidden": COLUMNS,
    "intermediate": OUT,
    "vocab": 50,
}
"""The flags of `make_checkpoint` for `in_a_llama`."""
