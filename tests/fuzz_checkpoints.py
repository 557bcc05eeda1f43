"""Small valid checkpoints in memory, for fuzzing, and a storage that watches what is read of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from samples import SAMPLES

from slicecast.convert.source.storage import ByteRange, missing_error

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class File:
    """A file: its first bytes, and zeros up to its size, which may be more than any disk holds."""

    head: bytes
    size: int


Files: TypeAlias = dict[str, File]


# ---- Valid checkpoints

_TENSORS: tuple[dict[str, tuple[str, list[int]]], ...] = (
    {"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("U8", [])},
    {
        "model.layers.0.mlp.experts.0.up_proj.weight_packed": ("I32", [4, 2]),
        "model.layers.0.mlp.experts.0.up_proj.weight_scale": ("BF16", [4, 1]),
        "model.layers.0.mlp.experts.0.up_proj.weight_shape": ("I64", [2]),
    },
    {
        "e": ("F32", [0, 7]),
        "f": ("F4", [2, 4]),
        "g": ("F8_E4M3", [3]),
        "größe": ("F8_E8M0", [1]),
        "h": ("F6_E2M3", [4]),
    },
)

# The widths of the dtypes above, in bits.
_BITS = {"F32": 32, "BF16": 16, "U8": 8, "I32": 32, "I64": 64, "F4": 4, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6}


def tensor_file(number: int, *, metadata: bool = False) -> File:
    """The file with one of the sets of tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    position = 0
    for name, (dtype, shape) in _TENSORS[number].items():
        end = position + math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return File(len(text).to_bytes(8, "little") + text, 8 + len(text) + position)


def _json_file(content: Any) -> File:
    text = json.dumps(content).encode()
    return File(text, len(text))


def _index(**files: int) -> File:
    weight_map = {name: f"{file}{SUFFIX}" for file, number in files.items() for name in _TENSORS[number]}
    return _json_file({"metadata": {"total_size": 100}, "weight_map": weight_map})


def _valid_checkpoints() -> list[Files]:
    """One file, several with an index and without, and configs of every format of weights."""
    shards = {"x.safetensors": tensor_file(0, metadata=True), "y.safetensors": tensor_file(1)}
    configs = [_json_file({"architectures": ["A"], "text_config": {"n": 1}, **s.config}) for s in SAMPLES.values()]
    sides = {
        "hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        "quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": True, "sym": False},
        "quant_config.json": {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True},
    }
    return [
        files | {CONFIG: config}
        for config in configs
        for files in (
            {"model.safetensors": tensor_file(2, metadata=True)},
            {**shards, INDEX: _index(x=0, y=1)},
            {**shards, "z.safetensors": tensor_file(2)},
            {**shards, INDEX: _index(x=0, y=1), **{name: _json_file(content) for name, content in sides.items()}},
        )
    ]


VALID = _valid_checkpoints()


# ---- The storage


class WatchedStorage:
    """Files in memory. Whoever asks for what is not there, or not plainly named, is noted.

    Attributes:
        violations: What was asked for, and should not have been.
    """

    path = "memory"

    def __init__(self, files: Files, *, believing: bool):
        """Files; `believing` is a storage that has no list, and takes over the names that the index gives."""
        self._files = files
        self._listed = frozenset(files) | (_named_by(files.get(INDEX)) if believing else frozenset())
        self.violations: list[str] = []

    def names(self) -> frozenset[str]:
        """As `Storage.names`."""
        return self._listed

    def size(self, file: str) -> int:
        """As `Storage.size`."""
        if not file.isprintable() or ".." in file or any(character in file for character in "/\\%?#*"):
            self.violations.append(f"size of {file!r}")
        if file not in self._files:
            raise missing_error(self.path, file)
        return self._files[file].size

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """As `Storage.read`."""
        file = self._files.get(wanted.file, File(b"", 0))
        stop = wanted.offset + wanted.nbytes
        end = file.size
        if wanted.file.endswith(SUFFIX):  # No data, and nothing that is not announced.
            end = min(end, 8 if stop <= 8 else 8 + int.from_bytes(file.head[:8], "little"))
        if not (0 <= wanted.offset <= stop <= end and sum(map(len, targets)) == wanted.nbytes):
            self.violations.append(f"{wanted}, of {end} bytes")
        position = wanted.offset
        for target in targets:
            part = file.head[position : position + len(target)]
            target[: len(part)] = part
            target[len(part) :] = bytes(len(target) - len(part))
            position += len(target)


def _named_by(index: File | None) -> frozenset[str]:
    try:
        named = json.loads(index.head if index is not None else b"")["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return frozenset()
    return frozenset(map(str, named))
