"""Decides, tensor by tensor, how a checkpoint stores what the rules ask for.

What is stored decides: a module that the config calls quantized but that is stored in bfloat16 is bfloat16. The
announcement of the checkpoint only tells apart what looks alike.
"""

import re
from collections.abc import Mapping

from slicecast.convert.box import Shape
from slicecast.convert.codecs import awq, bitsandbytes, eight_bit, four_bit_floats, gptq, mlx, packed_integers, plain
from slicecast.convert.codecs.base import FLOAT_DTYPES, StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import (
    DuplicateTensorError,
    MissingPartnerError,
    MissingTensorError,
    UnsupportedFormatError,
)
from slicecast.convert.source.safetensors_header import TensorInfo

_WEIGHT = ".weight"

# Tensors that a quantized model needs to run quantized: scales of activations and of the KV cache. Without quantization
# they mean nothing. A scale that belongs into the weights, as `pre_quant_scale`, is not among them.
_RUNTIME_ONLY = re.compile(
    r".*\.("
    r"input_scale|activation_scale|input_global_scale|input_scale_ub|input_zero_point|qscale_act|"
    r"input_activation_scale|output_activation_scale|prob_output_scale|"
    r"[kvq]_scale|k_zero_point|v_zero_point|[kv]_proj\.output_scale"
    r")"
)
RUNTIME_ONLY_REASON = "scales of activations and of the KV cache, which only a quantized model uses"


def is_runtime_only(name: str) -> bool:
    """Whether a tensor matters to a model that runs quantized, and to nothing else."""
    return _RUNTIME_ONLY.fullmatch(name) is not None


def find(
    name: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """How the checkpoint stores the tensor that a rule calls `name`.

    Args:
        name: The name in the rules, for example `...gate_proj.weight`.
        shape: The shape that `config.json` gives it.
        tensors: All tensors of the checkpoint.
        quantization: What the checkpoint announces.

    Raises:
        MissingTensorError: If it is stored in no form that we know.
        MissingPartnerError: If only a partner of it is there, or one of its partners is missing.
        DuplicateTensorError: If it is there in two forms.
        UnsupportedFormatError: If it is stored in a form that no codec covers.
        ShapeError: If its shape, or that of a partner, is not the expected one.
    """
    names = [name, f"{name}_blocks"]
    if name.endswith(_WEIGHT):
        base = name.removesuffix(_WEIGHT)
        names += [f"{base}.weight_packed", f"{base}.qweight"]
    forms = [tensors[candidate] for candidate in names if candidate in tensors]
    if not forms:
        raise _missing(name, shape, tensors, quantization)
    if len(forms) > 1:
        raise DuplicateTensorError(
            f"{forms[0].file}: tensor '{name}' is stored twice: as '{forms[0].name}' and as '{forms[1].name}' in "
            f"{forms[1].file}. Remove one of the two from the checkpoint."
        )
    (tensor,) = forms
    if tensor.name == name and tensor.dtype in FLOAT_DTYPES:
        return plain.stored(tensor, shape)
    if quantization is not None and quantization.refusal is not None:
        raise _unsupported(tensor, quantization)
    if tensor.name == f"{name}_blocks":
        return four_bit_floats.stored_as_blocks(name, shape, tensors)
    if tensor.name.endswith(".weight_packed"):
        if tensor.dtype == "U8":
            return four_bit_floats.stored(name, tensor, shape, tensors)
        return packed_integers.stored(base, shape, tensors, quantization)
    if tensor.name.endswith(".qweight"):
        if quantization is not None and quantization.method == "gptq":
            return gptq.stored(base, shape, tensors, quantization)
        if quantization is not None and quantization.method == "awq":
            return awq.stored(base, shape, tensors, quantization)
        raise _unsupported(tensor, quantization)
    return _quantized_weight(name, tensor, shape, tensors, quantization)


def _quantized_weight(
    name: str,
    tensor: TensorInfo,
    shape: Shape,
    tensors: Mapping[str, TensorInfo],
    quantization: QuantizationConfig | None,
) -> StoredTensor:
    """How a weight is stored under its own name, in a dtype that is no number by itself."""
    if tensor.dtype == "F4" or (tensor.dtype in ("I8", "U8") and four_bit_floats.is_stored(name, tensors)):
        return four_bit_floats.stored(name, tensor, shape, tensors)
    if tensor.dtype == "U8" and bitsandbytes.state_of(name, tensors) is not None:
        return bitsandbytes.stored(name, shape, tensors)
    if tensor.dtype == "U32":
        return mlx.stored(name, shape, tensors, quantization)
    if tensor.dtype in eight_bit.DTYPES:
        return eight_bit.stored(name, shape, tensors, quantization)
    raise _unsupported(tensor, quantization)


def _unsupported(tensor: TensorInfo, quantization: QuantizationConfig | None) -> UnsupportedFormatError:
    if quantization is None:
        announced = ", and config.json announces no quantization"
    else:
        announced = f"; the announced quantization is {quantization.refusal or repr(quantization.description)}"
    return UnsupportedFormatError(
        f"{tensor.file}: tensor '{tensor.name}' is stored as {tensor.dtype}{list(tensor.shape)}{announced}, which is "
        "not supported. `slicecast formats` lists what is; get the checkpoint in one of these formats."
    )


def _missing(
    name: str, shape: Shape, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> MissingPartnerError | MissingTensorError | UnsupportedFormatError:
    if quantization is not None and quantization.refusal is not None:
        return UnsupportedFormatError(
            f"tensor '{name}' is in no file of the checkpoint under this name; the announced quantization is "
            f"{quantization.refusal}, which is not supported. `slicecast formats` lists what is."
        )
    base = name.removesuffix(_WEIGHT)
    partners = [f"{base}.weight_scale", f"{base}.weight_scale_inv", f"{base}.scales", f"{name}_scales"]
    scale = next((tensors[partner] for partner in partners if partner in tensors), None)
    if scale is not None:
        return MissingPartnerError(
            f"{scale.file}: tensor '{scale.name}' is a scale, but the weight that it scales ('{name}', "
            f"'{base}.weight_packed' or '{base}.qweight') is in no file of the checkpoint. Download the missing file."
        )
    return MissingTensorError(
        f"tensor '{name}' with shape {list(shape)} is in no file of the checkpoint. Download the missing file, or "
        "use the config.json that was published with the weights."
    )
