"""gptqmodel: GPTQ in both versions of the format. It also packs AWQ, which AutoAWQ's own functions read."""

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from formats import Format, Quantize, Quantized, Shape
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import save_file
from torch import Tensor

AWQ_BITS = 4


def shapes(bits: int) -> tuple[Shape, ...]:
    """Shapes whose rows fill words, as zero points need them to, of which as few as possible come together."""
    rows = 32 // bits
    return (8 * rows, 256), (5 * rows, 384), (rows, 128), (17 * rows, 640)


def load_autoawq() -> ModuleType:
    """AutoAWQ's packing functions, from its source archive; the package itself needs a GPU and an old transformers."""
    path = Path(sys.prefix) / "autoawq" / "packing_utils.py"
    specification = importlib.util.spec_from_file_location("awq_packing_utils", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


autoawq = load_autoawq()


def scales_and_zeros(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """A scale and a zero point for each group of inputs, float32[out, groups], the scales' values those of float16."""
    groups = weight.unflatten(1, (-1, group))
    if symmetric:
        scale = groups.abs().amax(2) * 2 / (2**bits - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(-low / scale)
    return scale.half().float(), zero


def linear(weight: Tensor) -> torch.nn.Linear:
    """A layer with this weight, for the library packs layers."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def gptq_config(bits: int, group: int, version: int, reordered: bool, symmetric: bool) -> dict[str, Any]:
    """The section that gptqmodel writes."""
    return {
        "bits": bits,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
        "desc_act": reordered,
        "group_size": group,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": symmetric,
        "true_sequential": True,
    }


def gptq(section: dict[str, Any], version: int) -> Quantize:
    """GPTQ's storage. How the codes are chosen does not matter here: they are the nearest ones."""
    bits, reordered, symmetric = section["bits"], section["desc_act"], section["sym"]

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        out, columns = weight.shape
        group = columns if section["group_size"] == -1 else section["group_size"]
        order = torch.randperm(columns, generator=random) if reordered else torch.arange(columns)
        group_index = torch.empty(columns, dtype=torch.int32)
        group_index[order] = torch.arange(columns, dtype=torch.int32) // group
        scale, zero = scales_and_zeros(weight[:, order], bits, group, symmetric)
        layer = TorchLinear(
            bits=bits,
            group_size=section["group_size"],
            sym=symmetric,
            desc_act=reordered,
            in_features=columns,
            out_features=out,
        )
        layer.pack_original(linear(weight), scale, zero, group_index)
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, offload_to_disk=False))
        names = ("qweight", "qzeros", "scales", "g_idx")
        stored = {name: getattr(layer, name).detach().contiguous().clone() for name in names}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_file({f"m.{name}": tensor for name, tensor in stored.items()}, file)
            exact = convert_gptq_file(file, torch.float32, section, "cpu")["m.weight"]
        return Quantized(stored, exact)

    return quantize


def awq(group: int) -> Quantize:
    """AWQ, decoded with float32 scales: AutoAWQ itself would round the products to float16."""

    def quantize(weight: Tensor, random: torch.Generator) -> Quantized:
        scale, zero = scales_and_zeros(weight, AWQ_BITS, group, symmetric=False)
        # As AutoAWQ does, for packing does not clip what is out of range by the rounding of the scale.
        wide_scale, wide_zero = (x.repeat_interleave(group, 1) for x in (scale, zero))
        codes = torch.round(weight / wide_scale + wide_zero).clamp(0, 2**AWQ_BITS - 1)
        nearest = (codes - wide_zero) * wide_scale
        layer = AwqTorchLinear(
            bits=AWQ_BITS,
            group_size=group,
            sym=False,
            desc_act=False,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
        )
        layer.pack(linear(nearest), scale, zero)
        stored = {name: getattr(layer, name).detach().contiguous() for name in ("qweight", "qzeros", "scales")}
        exact = autoawq.dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), AWQ_BITS, group)
        return Quantized(stored, exact.T)

    return quantize


def gptq_formats() -> Iterator[Format]:
    """Both versions, three widths, inputs in order or not, with groups or one scale for all inputs."""
    for version, bits, reordered, group in itertools.product((1, 2), (2, 4, 8), (False, True), (32, 128, -1)):
        if reordered and group == -1:  # With a single group there is nothing to order.
            continue
        for symmetric in (True, False):
            section = gptq_config(bits, group, version, reordered, symmetric)
            order, kind = "desc_act" if reordered else "in-order", "symmetric" if symmetric else "asymmetric"
            name = f"gptq-v{version}-int{bits}-{order}-group{group}-{kind}"
            yield Format(name, {"quantization_config": section}, gptq(section, version), shapes(bits))


def awq_formats() -> Iterator[Format]:
    """AutoAWQ's version `gemm`."""
    for group in (32, 128):
        section = {
            "bits": AWQ_BITS,
            "group_size": group,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
        yield Format(f"awq-group{group}", {"quantization_config": section}, awq(group), shapes(AWQ_BITS))


FORMATS: tuple[Format, ...] = (*gptq_formats(), *awq_formats())
