"""bitsandbytes: NF4 and FP4, nested or not."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from formats import Format, Quantize, Quantized, Shape
from torch import Tensor

# Blocks run over the whole weight, also from one row into the next.
SHAPES: tuple[Shape, ...] = ((24, 192), (3, 128), (40, 640))
ACROSS_ROWS: tuple[Shape, ...] = ((24, 160), (7, 50), (130, 33 * 2))


def dequantize(saved: Mapping[str, Tensor]) -> Tensor:
    """The library's weight in float32 from what it has saved, by what follows the weight's name and a dot.

    Its native function for CPUs is wrong where blocks cross rows (version 0.50.2); its function in PyTorch is not.
    """
    stored = saved["weight"]
    partners = {name: tensor for name, tensor in saved.items() if name != "weight"}
    state = QuantState.from_dict(partners, device=torch.device("cpu"))
    state.dtype = torch.float32
    weight: Tensor
    if state.shape[1] % state.blocksize == 0:
        weight = dequantize_4bit(stored, state)
    else:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        # Without the decorator, which compiles.
        function = _dequantize_4bit_compute.__wrapped__
        weight = function(stored.reshape(-1), absmax, state.code, state.blocksize, state.shape, torch.float32)
    return weight


def quantizer(kind: str, nested: bool, block: int) -> Quantize:
    """The library's 4-bit format, its state as transformers stores it beside the weight."""

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        codes, state = quantize_4bit(weight.bfloat16(), blocksize=block, compress_statistics=nested, quant_type=kind)
        stored = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        return Quantized(stored, dequantize(stored))

    return quantize


def formats() -> Iterator[Format]:
    """All kinds, with the usual blocks and with others."""
    for kind, nested, block in itertools.product(("nf4", "fp4"), (False, True), (64, 128)):
        section = {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "llm_int8_skip_modules": None,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }
        name = f"{kind}-{'nested' if nested else 'flat'}-block{block}"
        yield Format(name, {"quantization_config": section}, quantizer(kind, nested, block), SHAPES + ACROSS_ROWS)


FORMATS: tuple[Format, ...] = tuple(formats())
