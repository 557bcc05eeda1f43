"""The golden vectors, and the checkpoints that store them.

A vector in `golden/quant` has the tensors that a format's own library stored, and the bfloat16 weight that the same
library made of them. Here each is put under the names and dtypes, and beside the `config.json`, of published
checkpoints, often of several publishers.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published

Array = np.ndarray
Tensors = dict[str, tuple[str, Array]]

GOLDEN = Path(__file__).parent / "golden" / "quant"
BF16 = np.dtype(ml_dtypes.bfloat16)

# gpt-oss has several experts in a tensor; the rows of a vector are dealt out to so many.
EXPERTS = 3


@dataclass(frozen=True)
class Vector:
    """A golden vector.

    Attributes:
        name: The file's name.
        meta: What it says about itself: the shape, the layout and its arguments, and whether the library is exact.
        tensors: The stored tensors, by their short names.
        expected: The library's weight, bfloat16[out, in].
    """

    name: str
    meta: Mapping[str, Any]
    tensors: Mapping[str, Array]
    expected: Array

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the layout."""
        arguments: Mapping[str, Any] = self.meta["args"]
        return arguments


@functools.cache
def load(name: str) -> Vector:
    """A vector from its file."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        meta = json.loads(str(data["meta"]))
        tensors = {key.removeprefix("t."): data[key] for key in data if key.startswith("t.")}
        tensors |= {key: tensors[key].view(BF16) for key in meta["bf16"]}
        return Vector(name, meta, tensors, data["expected"].view(BF16))


@dataclass(frozen=True)
class Spelling:
    """A checkpoint that stores a vector.

    Attributes:
        name: Whose checkpoints are like this.
        tensors: The tensors by name, as (dtype in the header, array).
        config: `config.json`.
        kernel: Whether a Pallas kernel decodes it.
        weight: The name of the logical tensor.
        side_configs: Other configs, by file name.
        experts: Whether the rows belong to several experts, and the logical tensor is `[experts, in, out]`.
        copies: How many times the vector is stored, the rows of one copy below those of the other.
    """

    name: str
    tensors: Tensors
    config: Mapping[str, Any]
    kernel: bool = True
    weight: str = "m.weight"
    side_configs: Mapping[str, Any] = field(default_factory=dict)
    experts: bool = False
    copies: int = 1


_HEADER_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32", "int8": "I8", "uint8": "U8"}


def as_stored(array: Array) -> tuple[str, Array]:
    """An array and the dtype that a header gives it."""
    return _HEADER_DTYPES[array.dtype.name], array


def quantized(section: published.Config) -> published.Config:
    """A `config.json` that is nothing but its quantization."""
    return {"quantization_config": section}


def block_fp8(vector: Vector) -> Iterator[Spelling]:
    """FP8 with a scale for each block of the matrix."""
    block, (w, s) = vector.arguments["b"], (vector.tensors["w"], vector.tensors["s"])
    weight = {"m.weight": ("F8_E4M3", w)}
    if s.dtype == np.float32:
        scale = as_stored(s)
        fp8 = {"num_bits": 8, "type": "float"}
        yield Spelling("deepseek", weight | {"m.weight_scale_inv": scale}, quantized(published.fp8_blocks(block)))
        yield Spelling(
            "deepseek-v4-base",
            weight | {"m.scale": scale},
            quantized(published.fp8_blocks(block)) | {"expert_dtype": "fp8"},
        )
        blocks = {"strategy": "block", "block_structure": block}
        section = published.compressed_tensors("float-quantized", **fp8, **blocks)
        yield Spelling("compressed-tensors", weight | {"m.weight_scale": scale}, quantized(section))
        section = published.modelopt("FP8_PB_WO", **fp8, block_structure=block)
        yield Spelling("modelopt", weight | {"m.weight_scale": scale}, quantized(section))
        # As ModelOpt 0.47 writes it: in small letters, and with an axis of length one after each axis of the scale.
        spread = {"m.weight_scale": as_stored(s[:, np.newaxis, :, np.newaxis])}
        yield Spelling("modelopt-0.47", weight | spread, quantized(published.modelopt("fp8_pb_wo")))
        return
    v4 = quantized(published.fp8_blocks(block, scale_fmt="ue8m0")) | {"expert_dtype": "fp4"}
    if block != [1, 32]:
        yield Spelling("deepseek-v4", weight | {"m.scale": ("F8_E8M0", s)}, v4)
        yield Spelling("bits", weight | {"m.weight_scale_inv": ("U8", s)}, v4)
        return
    yield Spelling("minimax", weight | {"m.weight_scale_inv": ("U8", s)}, quantized(published.MXFP8))
    yield Spelling("e8m0", weight | {"m.weight_scale_inv": ("F8_E8M0", s)}, quantized(published.MXFP8))
    arguments = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    section = published.compressed_tensors("mxfp8-quantized", **arguments)
    yield Spelling("compressed-tensors", weight | {"m.weight_scale": ("U8", s)}, quantized(section))
    section = published.modelopt("MXFP8", num_bits=8, type="float", group_size=32)
    yield Spelling("modelopt", weight | {"m.weight_scale": ("U8", s)}, quantized(section))


def eight_bits(vector: Vector) -> Iterator[Spelling]:
    """FP8 or INT8 with a scale for each row, or one for the tensor."""
    w, s, integers = vector.tensors["w"], vector.tensors["s"], vector.arguments["i8"]
    weight = {"m.weight": ("I8" if integers else "F8_E4M3", w)}
    strategy = "channel" if s.size > 1 else "tensor"
    section = published.compressed_tensors(
        "int-quantized" if integers else "float-quantized",
        num_bits=8,
        type="int" if integers else "float",
        strategy=strategy,
    )
    yield Spelling("compressed-tensors", weight | {"m.weight_scale": as_stored(s)}, quantized(section))
    if integers:
        return
    if strategy == "channel":
        scale = {"m.weight_scale": as_stored(s)}
        yield Spelling("fbgemm", weight | scale, quantized(published.FBGEMM_FP8))
        flat = {"m.weight_scale": as_stored(s.reshape(-1))}
        algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
        side = {"hf_quant_config.json": published.hf_quant_config(algorithm)}
        yield Spelling("modelopt", weight | flat, {}, side_configs=side)
    else:
        scalar, inputs = {"m.weight_scale": as_stored(s.reshape(()))}, {"m.input_scale": as_stored(s.reshape(()))}
        yield Spelling("autofp8", weight | scalar | inputs, quantized(published.FP8_PER_TENSOR))
        section = published.modelopt("FP8", num_bits=8, type="float")
        yield Spelling("modelopt", weight | scalar | inputs, quantized(section))
        square = {"m.weight_scale": as_stored(s.reshape(1, 1))}
        yield Spelling("square", weight | square, quantized(published.FP8_PER_TENSOR))


def packed_integers(vector: Vector) -> Iterator[Spelling]:
    """compressed-tensors `pack-quantized`."""
    arguments, t = vector.arguments, vector.tensors
    tensors = {
        "m.weight_packed": as_stored(t["p"]),
        "m.weight_scale": as_stored(t["s"]),
        "m.weight_shape": ("I64", np.array(vector.meta["shape"], np.int64)),
    }
    if arguments["zp"]:
        tensors["m.weight_zero_point"] = as_stored(t["z"])
    section = published.compressed_tensors(
        "pack-quantized",
        num_bits=arguments["b"],
        group_size=arguments["g"],
        strategy="group" if arguments["g"] else "channel",
        symmetric=not arguments["zp"],
    )
    yield Spelling("compressed-tensors", tensors, quantized(section))
    yield Spelling("kimi", tensors, {"text_config": quantized(section)})
    # Before they were called quantization_config, and with the shape in another integer.
    old = tensors | {"m.weight_shape": ("I32", np.array(vector.meta["shape"], np.int32))}
    yield Spelling("old", old, {"compression_config": section})


def packed_floats(vector: Vector) -> Iterator[Spelling]:
    """MXFP4 and NVFP4."""
    p, s, kind = vector.tensors["p"].view(np.uint8), vector.tensors["s"], vector.arguments["k"]
    codes, group = {"num_bits": 4, "type": "float"}, vector.arguments["g"]
    if kind == "nv_ct":
        tensors = {
            "m.weight_packed": ("U8", p),
            "m.weight_scale": ("F8_E4M3", s),
            "m.weight_global_scale": as_stored(vector.tensors["g"]),
        }
        arguments = {"strategy": "tensor_group", "group_size": group, "scale_dtype": "torch.float8_e4m3fn"}
        section = published.compressed_tensors("nvfp4-pack-quantized", **codes, **arguments)
        yield Spelling("compressed-tensors", tensors, quantized(section))
        inputs = {"m.input_global_scale": ("F32", np.ones(1, np.float32))}
        yield Spelling("activations", tensors | inputs, quantized(section))
        return
    if kind == "nv_mo":
        tensors = {
            "m.weight": ("U8", p),
            "m.weight_scale": ("F8_E4M3", s),
            "m.weight_scale_2": as_stored(vector.tensors["g"]),
            "m.input_scale": ("F32", np.float32(1).reshape(())),
        }
        section = published.modelopt("NVFP4", **codes, group_size=group)
        yield Spelling("modelopt", tensors, quantized(section))
        side = {"hf_quant_config.json": published.hf_quant_config("NVFP4", group_size=group)}
        yield Spelling("hf_quant_config", tensors, {}, side_configs=side)
        return
    v4 = quantized(published.fp8_blocks(scale_fmt="ue8m0")) | {"expert_dtype": "fp4"}
    yield Spelling("deepseek-v4", {"m.weight": ("I8", p), "m.scale": ("F8_E8M0", s)}, v4)
    # In the header of this dtype the shape is the logical one.
    yield Spelling("f4", {"m.weight": ("F4", p), "m.scale": ("F8_E8M0", s)}, v4)
    scale = {"m.weight_scale": ("U8", s)}
    yield Spelling("mimo", {"m.weight": ("U8", p)} | scale, quantized(published.MIMO))
    arguments = {"strategy": "group", "group_size": group, "scale_dtype": "torch.uint8"}
    section = published.compressed_tensors("mxfp4-pack-quantized", **codes, **arguments)
    yield Spelling("kimi-k3", {"m.weight_packed": ("U8", p)} | scale, {"text_config": quantized(section)})
    name, (_, groups) = "m.experts.gate_up_proj", s.shape
    blocks = {
        f"{name}_blocks": ("U8", p.reshape(EXPERTS, -1, groups, 16)),
        f"{name}_scales": ("U8", s.reshape(EXPERTS, -1, groups)),
    }
    yield Spelling("gpt-oss", blocks, quantized(published.GPT_OSS), weight=name, experts=True)


def gptq(vector: Vector) -> Iterator[Spelling]:
    """GPTQ, with zeros as they are (version 2) or less one (version 1)."""
    arguments = vector.arguments
    bits, group, reordered = arguments["b"], arguments["g"], arguments["d"]
    # The outputs of a vector are stored twice: half as many are fewer than the kernel takes at once.
    twice = {key: np.concatenate([array, array], axis=-1) for key, array in vector.tensors.items() if array.ndim > 1}
    tensors = {f"m.{key.removeprefix('a.')}": as_stored(array) for key, array in (vector.tensors | twice).items()}
    spelling = functools.partial(Spelling, kernel=not reordered, copies=2)

    def section(checkpoint_format: str | None) -> published.Config:
        return published.gptq(bits, group, desc_act=reordered, checkpoint_format=checkpoint_format)

    if not arguments["v1"]:
        yield spelling("gptqmodel", tensors, quantized(section("gptq_v2")))
        return
    yield spelling("gptqmodel", tensors, quantized(section("gptq")))
    yield spelling("unversioned", tensors, quantized(section(None)))
    side = {"quantize_config.json": section(None)}
    yield spelling("autogptq", tensors, {}, side_configs=side)
    if not reordered:
        without = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
        yield spelling("without-g_idx", without, quantized(section("gptq")))


def awq(vector: Vector) -> Iterator[Spelling]:
    """AWQ, version `gemm`."""
    tensors = {f"m.{key.removeprefix('a.')}": as_stored(array) for key, array in vector.tensors.items()}
    group = vector.arguments["g"]
    yield Spelling("transformers", tensors, quantized(published.awq(group)))
    side = {"quant_config.json": {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": "GEMM"}}
    yield Spelling("autoawq", tensors, {}, side_configs=side)


def bitsandbytes(vector: Vector) -> Iterator[Spelling]:
    """NF4 and FP4 of bitsandbytes, its state in JSON beside the weight."""
    # The vector of a ragged shape does not say that it is NF4 for a bfloat16 model, other than in its name.
    state = {"quant_type": "nf4", "dtype": "bfloat16"} | vector.arguments["st"]
    kind, nested = state["quant_type"], "nested_offset" in state
    tensors = {f"m.weight{key.removeprefix('a')}": as_stored(array) for key, array in vector.tensors.items()}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"m.weight.quant_state.bitsandbytes__{kind}"] = ("U8", text)
    yield Spelling("bitsandbytes", tensors, quantized(published.bitsandbytes(kind, nested=nested)), kernel=False)


def mlx(vector: Vector) -> Iterator[Spelling]:
    """MLX's affine mode."""
    t = vector.tensors
    tensors = {"m.weight": ("U32", t["w"]), "m.scales": as_stored(t["s"]), "m.biases": as_stored(t["b"])}
    bits, group = vector.arguments["b"], vector.arguments["g"]
    yield Spelling("mlx", tensors, {"quantization": published.mlx(bits, group)}, kernel=False)
    section = published.mlx(bits, group, "affine")
    yield Spelling("mode", tensors, {"quantization": section, "quantization_config": section}, kernel=False)


LAYOUTS: dict[str, Callable[[Vector], Iterator[Spelling]]] = {
    "AWQ": awq,
    "BlockFP8": block_fp8,
    "BnB4": bitsandbytes,
    "ChannelTensor": eight_bits,
    "GPTQ": gptq,
    "MLXAffine": mlx,
    "PackFP4": packed_floats,
    "PackInt": packed_integers,
}
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
EXACT = [name for name in NAMES if load(name).meta["exact"]]
ROUNDED = [name for name in NAMES if not load(name).meta["exact"]]


def spellings(vector: Vector) -> list[Spelling]:
    """All checkpoints of this file that store a vector."""
    return list(LAYOUTS[vector.meta["layout"]](vector))
