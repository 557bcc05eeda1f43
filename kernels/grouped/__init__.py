"""Row-major quantized weights with a scale for each group of columns, to transposed bfloat16 or float32."""

from slicecast.kernels.grouped.api import dequantize, kernel_agrees
from slicecast.kernels.grouped.formats import Code, ScaleFormat

__all__ = ["Code", "ScaleFormat", "dequantize", "kernel_agrees"]
