"""Which files make up a checkpoint, and whether they agree with its index and with each other. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from slicecast.convert.errors import DuplicateTensorError, HeaderError, MissingFileError, SlicecastError
from slicecast.convert.source.safetensors_header import MAX_HEADER_BYTES, MAX_NAME_CHARACTERS, TensorInfo, clip, is_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
# The longest config or index that is read, as long as a header may be. An index names the tensors of all headers; those
# of Kimi-K2.6 have 32 MB together.
MAX_JSON_BYTES = MAX_HEADER_BYTES
# Weights that we do not read, to be named when there is nothing else.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".msgpack")
# Characters that are more than a part of a name to a file system, a URL or a pattern.
_NOT_IN_FILES = frozenset("/\\%?#*")
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
        if not is_name(name):
            raise HeaderError(
                f"{INDEX}: tensor {clip(name)}: found a name that cannot be shown, or is too long, expected at most "
                f"{MAX_NAME_CHARACTERS} characters that can be printed. Download the index again."
            )
        if not _is_plain(file) or not file.endswith(SUFFIX):
            raise HeaderError(
                f"{INDEX}: tensor {name!r}: found file {clip(file)}, expected the name of a {SUFFIX} file in the same "
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
    for file in files:
        if not _is_plain(file):
            raise HeaderError(
                f"{path}: found the file {clip(file)}, expected a name of at most {MAX_NAME_CHARACTERS} characters "
                f"that can be printed, without '..' and any of {' '.join(sorted(_NOT_IN_FILES))}. Rename it."
            )
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


def _is_plain(file: Any) -> TypeGuard[str]:
    """Tells whether a file name stays in its directory, wherever that is, and can be shown."""
    return is_name(file) and ".." not in file and _NOT_IN_FILES.isdisjoint(file)


def _some(names: Sequence[str]) -> str:
    """Lists a few names and counts the rest."""
    shown = ", ".join(map(clip, names[:NAMES_SHOWN]))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
