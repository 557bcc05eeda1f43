"""Published checkpoints of every model that MaxText trains: their configs, and the headers that their files have.

The data are in `data/models`; `scripts/describe_published_models.py` wrote them, from sources other than slicecast.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecast.convert.source.checkpoint import Checkpoint
from slicecast.convert.source.directory import Directory
from slicecast.convert.source.safetensors_header import DTYPE_BITS, TensorInfo

_FOLDER = Path(__file__).parent / "data" / "models"
# What publishers cut their checkpoints to.
FILE_BYTES = 5 * 10**9
# Where a file's data begin. Headers of real files are of about this length; nothing depends on the number.
HEADER_BYTES = 100_000


@dataclass(frozen=True)
class PublishedModel:
    """One published checkpoint.

    Attributes:
      name: MaxText's name of the model.
      repository: where it is published on Hugging Face; None if only MaxText's own code tells of it.
      config: those fields of `config.json` that define shapes and rules.
      tensors: dtype and shape of every tensor by its name on disk, neighbors in the model next to each other.
    """

    name: str
    repository: str | None
    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def names() -> list[str]:
    """MaxText's names of the models, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@functools.cache
def load(name: str) -> PublishedModel:
    """The published checkpoint of a model."""
    content = json.loads((_FOLDER / f"{name}.json").read_text())
    tensors = {
        tensor: (dtype, tuple(shape))
        for pattern, dtype, shape, ranges in content["tensors"]
        for tensor in _expand(pattern, ranges)
    }
    ordered = {tensor: tensors[tensor] for tensor in sorted(tensors, key=_by_number)}
    return PublishedModel(name, content["repository"], content["config"], ordered)


def checkpoint(name: str, file_bytes: int = FILE_BYTES) -> Checkpoint:
    """A published checkpoint as its headers describe it, with no file behind it.

    A file ends before the tensor that would make it longer than `file_bytes`. Offsets and sizes are consistent.
    """
    model = load(name)
    files: list[list[str]] = [[]]
    room = file_bytes
    for tensor, (dtype, shape) in model.tensors.items():
        nbytes = _nbytes(dtype, shape)
        if files[-1] and nbytes > room:
            files.append([])
            room = file_bytes
        files[-1].append(tensor)
        room -= nbytes
    infos: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    for number, members in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        offset = HEADER_BYTES
        for tensor in members:
            dtype, shape = model.tensors[tensor]
            infos[tensor] = TensorInfo(tensor, file, dtype, shape, offset, _nbytes(dtype, shape))
            offset += infos[tensor].nbytes
        sizes[file] = offset
    tensors = {tensor: infos[tensor] for tensor in sorted(infos)}
    return Checkpoint(Directory(f"published/{name}"), model.config, tensors, sizes)


def _expand(pattern: str, ranges: list[str]) -> Iterator[str]:
    """The names that a pattern stands for; see the script for how ranges are spelled."""
    for numbers in itertools.product(*(list(_numbers(each)) for each in ranges)):
        yield pattern.format(*numbers)


def _numbers(slices: str) -> Iterator[int]:
    for piece in slices.split(","):
        yield from range(*map(int, piece.split(":")))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 2: of two numbers, the longer one is the larger one."""
    return [(len(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
