"""Grouped symmetric INT4 weights to transposed bfloat16 or float32: the device step of `pack-quantized`."""

from slicecast.kernels.int4_grouped.api import dequantize, sharded

__all__ = ["dequantize", "sharded"]
