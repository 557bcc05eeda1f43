"""Tensors as a checkpoint stores them: writes small checkpoints, and decodes a tensor of them on each of our paths."""

import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # Makes NumPy know bfloat16.
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from slicecast.convert.codecs import detect, quantization_config
from slicecast.convert.codecs.base import StoredTensor
from slicecast.convert.source.checkpoint import open_checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.reader import Reader
from slicecast.convert.verification import definition
from slicecast.kernels.implementation import Implementation

Tensors = Mapping[str, tuple[str, np.ndarray]]

BF16 = np.dtype(ml_dtypes.bfloat16)


def write(
    directory: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    side_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint of one file.

    Args:
        directory: Where; made if it is not there.
        tensors: By name, the dtype as headers spell it, and an array with the bytes and the shape. For F4 the array has
            bytes, and the header gets twice as many elements on the last axis.
        config: The content of `config.json`.
        side_configs: The contents of further JSON files, by file name.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in {"config.json": config, **(side_configs or {})}.items():
        (directory / file).write_text(json.dumps(content))
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in tensors.items():
        shape = [*array.shape[:-1], 2 * array.shape[-1]] if dtype == "F4" else list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


def find(directory: Path, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """How the checkpoint stores a tensor."""
    checkpoint = open_checkpoint(str(directory))
    announced = quantization_config.read(checkpoint.config, checkpoint.side_configs)
    return detect.find(name, shape, checkpoint.tensors, announced)


def prepare(directory: Path, tensor: StoredTensor, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Rows of a tensor, read and prepared for the device."""
    reader = Reader(str(directory))
    views = [part.view(reader.read(part.spans(start, stop)), start, stop) for part in tensor.parts]
    return tensor.prepare(views, start, stop)


# The implementation is part of the key: what was traced for the interpreter is not taken for anything else.
@functools.partial(jax.jit, static_argnames=("codec", "dtype", "transposed", "implementation"))
def _decode(
    arrays: tuple[jax.Array, ...], codec: Any, dtype: str, transposed: bool, implementation: Implementation
) -> jax.Array:
    batch = [array[jnp.newaxis] for array in arrays]
    values: jax.Array = codec.decode(batch, dtype=dtype, transposed=transposed, implementation=implementation)[0]
    return values


def decode(
    directory: Path,
    name: str,
    shape: tuple[int, ...],
    *,
    rows: tuple[int, int] | None = None,
    implementation: Implementation = "xla",
    dtype: str = "bfloat16",
    transposed: bool = False,
) -> np.ndarray:
    """A tensor's rows through detection, reader and codec, `dtype[rows, ...]`, or `[columns, rows]` if transposed.

    The Pallas kernel runs in the interpreter for TPUs.
    """
    tensor = find(directory, name, shape)
    start, stop = rows or (0, shape[0])
    arrays = prepare(directory, tensor, start, stop)
    with pltpu.force_tpu_interpret_mode():
        return np.asarray(_decode(arrays, tensor.codec, dtype, transposed, implementation))


def expected(directory: Path, name: str, shape: tuple[int, ...], *, rows: tuple[int, int] | None = None) -> np.ndarray:
    """The same through the definitions that `verify` uses, not yet rounded: in the stored dtype, or float32."""
    start, stop = rows or (0, shape[0])
    return definition.rows(Directory(str(directory)), find(directory, name, shape), start, stop)
