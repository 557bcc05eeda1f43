"""compressed-tensors, the library of llm-compressor and vLLM: all its formats, and block FP8 of any shape."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from formats import Format, Quantize, Quantized, Shape
from torch import Tensor

# 40 and 130 are multiples of nothing that a format uses; rows never have to be.
GROUPED: tuple[Shape, ...] = ((48, 256), (40, 384), (9, 128), (131, 640))
ANY: tuple[Shape, ...] = ((48, 256), (130, 129), (1, 7), (37, 300))
BLOCKS: tuple[Shape, ...] = ((256, 384), (130, 129), (576, 256), (1, 7), (300, 640))

# With these scales the library computes in float32; its products with float16 scales are rounded to float16 before.
SCALE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def extremes(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each part of a weight that has its own scale, in the scale's shape."""
    if arguments.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if arguments.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if arguments.strategy == "block":
        rows, columns = arguments.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (rows, columns))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(-1, (-1, arguments.group_size))
    return groups.amin(-1), groups.amax(-1)


def parameters(weight: Tensor, arguments: QuantizationArgs, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """What llm-compressor would add to a module before the library compresses it: scales and zero points."""
    smallest, largest = extremes(weight, arguments)
    factor = generate_gparam(weight.amin(), weight.amax()) if arguments.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(smallest, largest, arguments, global_scale=factor)
    found = {"weight_scale": scale.to(scale_dtype), "weight_zero_point": zero}
    return found | ({} if factor is None else {"weight_global_scale": factor})


def quantizer(layout: str, scheme: QuantizationScheme, scale_dtype: torch.dtype) -> Quantize:
    """The library's compressor of a format."""
    compressor: Any = BaseCompressor.get_value_from_registry(layout)

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        found = parameters(weight, scheme.weights, scale_dtype)
        wide = {name: x.float() if name == "weight_scale" else x for name, x in found.items()}
        compressed = compressor.compress({"weight": weight} | wide, scheme)
        exact: Tensor = compressor.decompress(compressed, scheme)["weight"]
        if compressed["weight_scale"].dtype == torch.float32:
            compressed["weight_scale"] = found["weight_scale"]
        return Quantized(compressed, exact)

    return quantize


def config(layout: str, scheme: QuantizationScheme) -> dict[str, Any]:
    """The `config.json` that the library writes."""
    groups = {"group_0": scheme}
    written = QuantizationConfig(
        config_groups=groups, format=layout, quantization_status="compressed", ignore=["lm_head"]
    )
    return {"quantization_config": written.to_dict()}


def one(name: str, layout: str, scheme: QuantizationScheme, shapes: tuple[Shape, ...], dtype: torch.dtype) -> Format:
    """A format of the library."""
    return Format(name, config(layout, scheme), quantizer(layout, scheme, dtype), shapes)


def weights_only(**arguments: Any) -> QuantizationScheme:
    """A scheme for the weights of linear layers."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))


def eight_bit_formats() -> Iterator[Format]:
    """`float-quantized` and `int-quantized`."""
    for label, dtype in SCALE_DTYPES.items():
        for strategy, shapes in (("tensor", ANY), ("channel", ANY), ("block", BLOCKS)):
            block = [128, 128] if strategy == "block" else None
            scheme = weights_only(num_bits=8, type="float", strategy=strategy, block_structure=block)
            yield one(f"float-quantized-{strategy}-{label}", "float-quantized", scheme, shapes, dtype)
        for strategy, symmetric in itertools.product(("tensor", "channel"), (True, False)):
            scheme = weights_only(num_bits=8, type="int", strategy=strategy, symmetric=symmetric)
            kind = "symmetric" if symmetric else "asymmetric"
            yield one(f"int-quantized-{strategy}-{kind}-{label}", "int-quantized", scheme, ANY, dtype)
    scheme = weights_only(num_bits=4, type="int", strategy="channel")
    yield one("int-quantized-4-bits", "int-quantized", scheme, ANY, torch.bfloat16)


def packed_formats() -> Iterator[Format]:
    """`pack-quantized`: every width, with and without zero points, and every scale."""
    for bits, symmetric, group in itertools.product(range(3, 9), (True, False), (32, 128, None)):
        scheme = weights_only(
            num_bits=bits,
            type="int",
            symmetric=symmetric,
            strategy="group" if group else "channel",
            group_size=group,
        )
        kind, size = "symmetric" if symmetric else "asymmetric", f"group{group}" if group else "channel"
        for label, dtype in SCALE_DTYPES.items():
            if label == "bf16" or bits == 4:
                name = f"pack-quantized-{bits}-{kind}-{size}-{label}"
                yield one(name, "pack-quantized", scheme, GROUPED if group else ANY, dtype)


def microscaling_formats() -> Iterator[Format]:
    """MXFP4, NVFP4 and MXFP8; the library decodes them to bfloat16, without an error."""
    for preset, layout in (
        ("MXFP4A16", "mxfp4-pack-quantized"),
        ("NVFP4A16", "nvfp4-pack-quantized"),
        ("MXFP8A16", "mxfp8-quantized"),
    ):
        scheme = preset_name_to_scheme(preset, ["Linear"])
        yield one(layout, layout, scheme, GROUPED, torch.float32)


def deepseek(rows: int, columns: int, scale_dtype: torch.dtype) -> Format:
    """DeepSeek's block FP8, its scales the largest value of the block over that of E4M3."""
    block = (rows, columns)

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        padded = maybe_pad_tensor_for_block_quant(weight, block)
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = (blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-8)
        if scale_dtype == torch.float8_e8m0fnu:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        codes, scale = codes[: weight.shape[0], : weight.shape[1]], scale.to(scale_dtype)
        dequantizer = FP8BlockDequantizer(weight_block_size=block, dtype=torch.float32)
        return Quantized(
            {"weight": codes, "weight_scale_inv": scale}, dequantizer._create_dequantized_weight(codes, scale)
        )

    section = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [rows, columns],
    }
    name = f"deepseek-{rows}x{columns}-{str(scale_dtype).removeprefix('torch.')}"
    return Format(name, {"quantization_config": section}, quantize, BLOCKS)


FORMATS: tuple[Format, ...] = (
    *eight_bit_formats(),
    *packed_formats(),
    *microscaling_formats(),
    *(deepseek(128, 128, dtype) for dtype in (*SCALE_DTYPES.values(), torch.float8_e8m0fnu)),
    deepseek(32, 32, torch.float8_e8m0fnu),
)
