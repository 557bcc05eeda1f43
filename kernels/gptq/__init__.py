"""GPTQ weights of 2, 4 or 8 bits to bfloat16 or float32: the device step of `quant_method: gptq`."""

from slicecast.kernels.gptq.api import dequantize, kernel_agrees

__all__ = ["dequantize", "kernel_agrees"]
