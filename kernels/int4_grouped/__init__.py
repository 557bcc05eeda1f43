"""Grouped symmetric INT4 weights to transposed bfloat16 or float32: the device step of `pack-quantized`."""

from slicecast.kernels.int4_grouped.api import Implementation, dequantize, kernel_agrees

__all__ = ["Implementation", "dequantize", "kernel_agrees"]
