"""AWQ weights of 4 bits to bfloat16 or float32: the device step of `quant_method: awq`, version `gemm`."""

from slicecast.kernels.awq.api import dequantize, kernel_agrees, padded_words

__all__ = ["dequantize", "kernel_agrees", "padded_words"]
