"""The table of supported formats, for `slicecast formats` and the README."""

from dataclasses import dataclass
from typing import Literal

Decoder = Literal["Pallas", "XLA", "host"]


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table.

    Attributes:
        name: What people call it.
        stored: The stored tensors of a weight `X`.
        decoder: What decodes it on TPUs: a Pallas kernel, XLA, or the host. Elsewhere XLA stands in for Pallas.
        models: Releases in this format.
    """

    name: str
    stored: str
    decoder: Decoder
    models: str


FORMATS: tuple[Format, ...] = (
    Format("bfloat16, float16, float32", "X.weight", "XLA", "most releases"),
    Format(
        "FP8 in blocks of any size",
        "X.weight F8_E4M3, X.weight_scale_inv, weight_scale or scale: F32, BF16, F16, F8_E8M0 or U8",
        "Pallas",
        "DeepSeek-V3, R1, V3.1; Kimi-K2-Instruct; Qwen3-FP8; MiniMax-M2; GLM-5-FP8; the dense part of DeepSeek-V4",
    ),
    Format(
        "FP8 per tensor or per row",
        "X.weight F8_E4M3 or F8_E5M2, X.weight_scale",
        "Pallas",
        "RedHatAI *-FP8-dynamic; GLM-4.5-FP8; Llama-3.1-405B-FP8 (fbgemm); AutoFP8; ModelOpt FP8",
    ),
    Format("MXFP8", "X.weight F8_E4M3, X.weight_scale or weight_scale_inv U8", "Pallas", "MiniMax-M3; ModelOpt MXFP8"),
    Format(
        "INT8 w8a8, symmetric or not",
        "X.weight I8, X.weight_scale, X.weight_zero_point",
        "Pallas",
        "RedHatAI *-quantized.w8a8",
    ),
    Format(
        "compressed-tensors packed INT4 and INT8, symmetric or not",
        "X.weight_packed I32, X.weight_scale, X.weight_zero_point",
        "Pallas",
        "Kimi-K2-Thinking, K2.5, K2.6; RedHatAI *-quantized.w4a16",
    ),
    Format(
        "compressed-tensors packed INT2, 3, 5, 6, 7",
        "as above; the host unpacks to INT8",
        "Pallas",
        "experiments of llm-compressor's users",
    ),
    Format(
        "MXFP4 of gpt-oss",
        "X_blocks U8, X_scales U8",
        "Pallas",
        "gpt-oss-20b, gpt-oss-120b",
    ),
    Format(
        "MXFP4",
        "X.weight_packed U8 or X.weight I8, U8 or F4; X.weight_scale U8 or X.scale F8_E8M0",
        "Pallas",
        "compressed-tensors MXFP4; the experts of DeepSeek-V4",
    ),
    Format(
        "NVFP4",
        "X.weight_packed or X.weight U8, X.weight_scale F8_E4M3, X.weight_global_scale or weight_scale_2",
        "Pallas",
        "RedHatAI *-NVFP4; nvidia *-NVFP4 and *-FP4",
    ),
    Format(
        "GPTQ 2, 4 and 8 bits, versions 1 and 2",
        "X.qweight, X.qzeros, X.scales, X.g_idx",
        "Pallas",
        "Qwen *-GPTQ-Int4 and -Int8; AutoRound. With desc_act XLA decodes it",
    ),
    Format("AWQ gemm", "X.qweight, X.qzeros, X.scales", "Pallas", "Qwen *-AWQ; AutoRound in AWQ's layout"),
    Format(
        "bitsandbytes NF4 and FP4, nested or not",
        "X.weight U8, X.weight.absmax, X.weight.quant_map, X.weight.quant_state.*",
        "host",
        "unsloth *-bnb-4bit",
    ),
    Format("MLX affine, 2 to 8 bits", "X.weight U32, X.scales, X.biases", "host", "mlx-community *-4bit"),
)
"""Everything that the codecs decode. What is not here is refused by name."""
