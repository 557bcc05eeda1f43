"""MLX: its affine format, in every width."""

import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import torch
from formats import Format, Quantize, Quantized
from torch import Tensor


def to_torch(array: mx.array) -> Tensor:
    """An MLX array as a tensor. NumPy, between the two, knows no bfloat16."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def affine(bits: int, group: int, dtype: mx.Dtype) -> Quantize:
    """MLX's codes with scales and biases. It decodes with float32 ones: else it would round twice to bfloat16."""

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        array = mx.array(weight.numpy()).astype(dtype)
        words, scales, biases = mx.quantize(array, group_size=group, bits=bits)
        wide = (x.astype(mx.float32) for x in (scales, biases))
        exact = mx.dequantize(words, *wide, group_size=group, bits=bits)
        stored = {"weight": to_torch(words), "scales": to_torch(scales), "biases": to_torch(biases)}
        return Quantized(stored, to_torch(exact))

    return quantize


def formats() -> Iterator[Format]:
    """Every width, group and dtype of the scales."""
    dtypes = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
    for bits, group, label in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128), dtypes):
        if group == 64 or (bits == 4 and label == "bf16"):
            section = {"group_size": group, "bits": bits}
            name = f"mlx-{bits}-group{group}-{label}"
            yield Format(name, {"quantization": section}, affine(bits, group, dtypes[label]), ((24, 128), (131, 640)))


FORMATS: tuple[Format, ...] = tuple(formats())
