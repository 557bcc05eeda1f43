"""Finds out from headers alone in which format each weight is stored, and which tensors are its partners.

A conversion asks the codecs for weights of which it knows name and shape, from the rules of a family. Here neither is
known, so that models work too that no family covers: the codecs are asked for the shapes that the stored ones allow.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from slicecast.convert.box import Shape
from slicecast.convert.codecs import bitsandbytes, detect, eight_bit
from slicecast.convert.codecs.base import FLOAT_DTYPES, StoredTensor
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import ShapeError, SlicecastError, UnsupportedFormatError
from slicecast.convert.source.safetensors_header import TensorInfo

# What stands in a name in place of `.weight` where integers are packed.
_PACKED_SUFFIXES = (".weight_packed", ".qweight")
_BLOCKS_SUFFIX = "_blocks"

# Dtypes of weights that keep their own name and mean nothing without partners.
_QUANTIZED_DTYPES = frozenset((*eight_bit.DTYPES, "U8", "U32", "F4"))

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as a model knows it.

    Attributes:
        name: Its name, for example `...gate_proj.weight`.
        shape: Its logical shape.
        format: What the plan calls its format, for example `int4 pack-quantized, group 32`.
        tensors: The names of the tensors that store it, the one with the values first.
        quantized: Whether it has values only together with its partners.
    """

    name: str
    shape: Shape
    format: str
    tensors: tuple[str, ...]
    quantized: bool

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def find_weights(
    tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None, known: Iterable[StoredTensor] = ()
) -> tuple[list[Weight], list[SlicecastError]]:
    """The weights of a checkpoint, and an error for each tensor that looks like a quantized one and is none.

    Args:
        tensors: All tensors of the checkpoint.
        quantization: What the checkpoint announces.
        known: Quantized weights that have been found already, by the rules of a family.
    """
    weights: list[Weight] = []
    used: set[str] = set()
    failures: dict[str, SlicecastError] = {}

    def add(stored: StoredTensor) -> None:
        weights.append(Weight(stored.name, stored.shape, stored.codec.description, stored.names, quantized=True))
        used.update(stored.names)

    for stored in known:
        if stored.parts[0].tensor.name not in used:
            add(stored)
    for tensor in tensors.values():
        name = _logical_name(tensor)
        if name is None or tensor.name in used or detect.is_runtime_only(tensor.name):
            continue
        try:
            add(_find(name, tensor, tensors, quantization))
        except SlicecastError as error:
            failures[tensor.name] = error
    # A partner may look like a quantized weight itself, until the weight that it belongs to has been found.
    weights += [
        Weight(tensor.name, tensor.shape, FLOAT_DTYPES[tensor.dtype].name, (tensor.name,), quantized=False)
        for tensor in tensors.values()
        if tensor.name not in used and tensor.dtype in FLOAT_DTYPES and not detect.is_runtime_only(tensor.name)
    ]
    return weights, [error for name, error in failures.items() if name not in used]


def _logical_name(tensor: TensorInfo) -> str | None:
    """What a model calls the weight whose values a tensor may hold; None if it is no quantized weight."""
    for suffix in _PACKED_SUFFIXES:
        if tensor.name.endswith(suffix):
            return f"{tensor.name.removesuffix(suffix)}.weight"
    if tensor.name.endswith(_BLOCKS_SUFFIX) and tensor.dtype == "U8":
        return tensor.name.removesuffix(_BLOCKS_SUFFIX)
    return tensor.name if tensor.dtype in _QUANTIZED_DTYPES else None


def _find(
    name: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> StoredTensor:
    """How a weight is stored: in the first of the possible shapes that a codec agrees with.

    Raises:
        SlicecastError: If none does.
    """
    unsupported: UnsupportedFormatError | None = None
    for shape in dict.fromkeys(_logical_shapes(name, tensor, tensors, quantization)):
        if 0 in shape:
            continue  # No model has such a weight, and codecs divide by its sizes.
        try:
            return detect.find(name, shape, tensors, quantization)
        except ShapeError:
            continue  # Its message would blame config.json for a shape that we tried.
        except UnsupportedFormatError as error:
            unsupported = unsupported or error
    announced = quantization.description if quantization else "no quantization"
    raise unsupported or UnsupportedFormatError(
        f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}{list(tensor.shape)}; with the shapes of its partners "
        f"this fits no format, and {announced} is announced."
    )


def _logical_shapes(
    name: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], quantization: QuantizationConfig | None
) -> Iterator[Shape]:
    """The shapes that a weight may have, those that are told more exactly first."""
    bits = sorted(quantization.bits) if quantization else []
    group_sizes = sorted(quantization.group_sizes) if quantization else []
    shape = tensor.shape
    if tensor.name.endswith(_BLOCKS_SUFFIX) and len(shape) == 4:
        experts, out, groups, nbytes = shape
        yield experts, 2 * groups * nbytes, out
    elif len(shape) == 2 and tensor.name.endswith(".qweight"):
        packed_outputs = quantization is not None and quantization.method == "awq"
        for width in bits or [4]:
            per_word = _WORD_BITS // width
            yield (shape[1] * per_word, shape[0]) if packed_outputs else (shape[1], shape[0] * per_word)
    elif len(shape) == 2 and tensor.dtype in ("I32", "U32"):
        module = name.removesuffix(".weight")
        for scale in (tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.scales")):
            if scale is not None and len(scale.shape) == 2:
                yield from ((shape[0], scale.shape[1] * size) for size in group_sizes)
        # Where a row has one scale, words tell its length but for what is unused of the last one.
        yield from ((shape[0], shape[1] * _WORD_BITS // width) for width in bits)
    elif bitsandbytes.state_of(name, tensors) is not None:
        yield 2 * math.prod(shape), 1  # It is stored flat, and its shape in a tensor's data.
    elif tensor.dtype == "U8" or tensor.name.endswith(".weight_packed"):
        yield (*shape[:-1], 2 * shape[-1]) if shape and tensor.dtype != "F4" else shape
    yield shape
    if shape:
        yield *shape[:-1], 2 * shape[-1]
