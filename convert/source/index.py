"""Which files make up a checkpoint, and whether they agree with its index and with each other. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slicecast.convert.errors import DuplicateTensorError, HeaderError, MissingFileError, SlicecastError
from slicecast.convert.source.safetensors_header import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
# Weights that we do not read, to be named when there is nothing else.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".msgpack")
# Names that one message lists before it only counts: enough to recognize a pattern.
NAMES_SHOWN = 3


def parse_index(index: Mapping[str, Any], present: Collection[str]) -> dict[str, str]:
    """Returns the index's map from tensor names to file names. Pure."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(
            f"{INDEX}: found no `weight_map`, or an empty one, expected a map from tensor names to file names. "
            f"Download it again."
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX) or not _is_plain(file):
            raise HeaderError(
                f"{INDEX}: tensor {name!r}: found file {file!r}, expected the name of a {SUFFIX} file in the same "
                f"directory, without a path. Download the index again; do not use one that points elsewhere."
            )
    if SINGLE in present and SINGLE not in weight_map.values():
        raise HeaderError(
            f"{INDEX}: found {SINGLE} beside it, which it does not name; expected one checkpoint in the directory. "
            f"Remove the one that is not meant."
        )
    return weight_map


def files_without_index(path: str, present: Collection[str]) -> list[str]:
    """Returns the files of a checkpoint that has no index; `path` is for messages. Pure."""
    files = sorted(name for name in present if name.endswith(SUFFIX))
    if not files:
        others = sorted(name for name in present if name.endswith(OTHER_WEIGHTS))
        found = f"no {SUFFIX} files" + (f" but {_some(others)}" if others else "")
        raise MissingFileError(
            f"{path}: found {found}, expected {INDEX} or {SINGLE}. "
            f"Download the safetensors version of the checkpoint, or convert it with its own library first."
        )
    return files


def duplicate_errors(tensors: Sequence[TensorInfo]) -> list[SlicecastError]:
    """Returns one error for every two files that hold the same names. Pure."""
    first: dict[str, str] = {}
    repeated: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in tensors:
        file = first.setdefault(tensor.name, tensor.file)
        if file != tensor.file:
            repeated[file, tensor.file].append(tensor.name)
    return [
        DuplicateTensorError(
            f"{file} and {other}: found {_some(names)} in both, expected each tensor in one file. Remove the file that "
            f"does not belong to the checkpoint, or download the checkpoint again."
        )
        for (file, other), names in repeated.items()
    ]


def index_errors(
    index: Mapping[str, str], present: Collection[str], file_sizes: Mapping[str, int], tensors: Sequence[TensorInfo]
) -> list[SlicecastError]:
    """Compares the index with the headers of the files that could be read (`file_sizes`). Pure."""
    errors: list[SlicecastError] = [
        MissingFileError(
            f"{file}: found no such file, expected it to hold {count} tensors that {INDEX} places there. "
            f"Download it into the same directory."
        )
        for file, count in sorted(Counter(index.values()).items())
        if file not in present
    ]
    held = {(tensor.name, tensor.file) for tensor in tensors}
    lacking, unnamed = defaultdict(list), defaultdict(list)
    for name, file in index.items():
        if file in file_sizes and (name, file) not in held:
            lacking[file].append(name)
    for tensor in tensors:
        if tensor.name not in index:
            unnamed[tensor.file].append(tensor.name)
    for file, names in sorted(lacking.items()):
        errors.append(
            HeaderError(
                f"{file}: found a header without {_some(names)}, expected them there because {INDEX} says so. "
                f"Download the file and the index again."
            )
        )
    for file, names in sorted(unnamed.items()):
        errors.append(
            HeaderError(
                f"{file}: found {_some(names)} that {INDEX} does not name, expected file and index to agree. "
                f"Download the file and the index again."
            )
        )
    return errors


def _is_plain(file: str) -> bool:
    """Tells whether a file name stays in its directory, and can be shown."""
    return file.isprintable() and not any(part in file for part in ("/", "\\", ".."))


def _some(names: Sequence[str]) -> str:
    """Lists a few names and counts the rest."""
    shown = ", ".join(map(repr, names[:NAMES_SHOWN]))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
