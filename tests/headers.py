"""Headers of checkpoints, without files: what detection is given."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from samples import SAMPLES, Sample

from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.codecs.quantization_config import QuantizationConfig
from slicecast.convert.errors import SlicecastError
from slicecast.convert.source.safetensors_header import DTYPE_BITS, TensorInfo

Infos = dict[str, TensorInfo]

SHAPE = (24, 64)


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    """A tensor in a file of its own, so that a message shows which one it is about."""
    return TensorInfo(name, f"{name}.safetensors", dtype, shape, 1000, math.prod(shape) * DTYPE_BITS[dtype] // 8)


def infos(sample: Sample) -> Infos:
    """The headers of a sample."""
    found = {}
    for name, (dtype, array) in sample.tensors.items():
        shape = (*array.shape[:-1], 2 * array.shape[-1]) if dtype == "F4" else array.shape
        found[name] = info(name, dtype, *shape)
    return found


def changed(
    name: str, /, drop: str | None = None, **tensors: tuple[Any, ...]
) -> tuple[Infos, QuantizationConfig | None]:
    """A sample's headers and announcement: without a tensor, and with others of which dtype and shape are given."""
    sample = SAMPLES[name]
    found = infos(sample)
    if drop is not None:
        del found[drop]
    return found | {key: info(key, *rest) for key, rest in tensors.items()}, quantization_config.read(sample.config)


def refusal(
    kind: type[SlicecastError],
    tensors: Mapping[str, TensorInfo],
    announced: QuantizationConfig | None,
    *words: str,
    name: str = "m.weight",
    shape: tuple[int, ...] = SHAPE,
) -> None:
    """Checks that detection raises exactly this kind of error, and that its message has these words."""
    with pytest.raises(SlicecastError) as error:
        detect.find(name, shape, tensors, announced)
    assert type(error.value) is kind, str(error.value)
    for word in words:
        assert word in str(error.value)
