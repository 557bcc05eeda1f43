"""Decides, tensor by tensor, how a checkpoint stores what the rules ask for."""

from collections.abc import Mapping

from slicecast.convert.box import Shape
from slicecast.convert.codecs import pack_quantized, plain
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
        MissingPartnerError: If only a partner of it is there.
        DuplicateTensorError: If it is there both plain and packed.
        UnsupportedFormatError: If it is stored in a form that no codec covers.
        ShapeError: If its shape is not the expected one.
    """
    tensor = tensors.get(name)
    base = name.removesuffix(_WEIGHT)
    packed = name.endswith(_WEIGHT) and pack_quantized.is_packed(base, tensors)
    if tensor is not None and packed:
        raise DuplicateTensorError(
            f"{tensor.file}: tensor '{name}' is stored as it is and also packed, as '{base}.weight_packed'. "
            "Remove one of the two from the checkpoint."
        )
    if packed:
        return pack_quantized.stored(base, shape, tensors, quantization)
    if tensor is None:
        scale = tensors.get(f"{base}.weight_scale") if name.endswith(_WEIGHT) else None
        if scale is not None:
            raise MissingPartnerError(
                f"{scale.file}: tensor '{scale.name}' is a scale, but the weight that it scales ('{name}' or "
                f"'{base}.weight_packed') is in no file of the checkpoint. Download the missing file."
            )
        raise MissingTensorError(
            f"tensor '{name}' with shape {list(shape)} is in no file of the checkpoint. Download the missing file, or "
            "use the config.json that was published with the weights."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        announced = f"; config.json announces '{quantization.description}'" if quantization else ""
        raise UnsupportedFormatError(
            f"{tensor.file}: tensor '{name}' is stored as {tensor.dtype}{announced}. Supported are "
            f"{', '.join(FLOAT_DTYPES)} and compressed-tensors pack-quantized INT4."
        )
    return plain.stored(tensor, shape)
