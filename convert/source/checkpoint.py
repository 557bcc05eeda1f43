"""Opens a checkpoint: its config, and where each tensor's bytes lie. Reads headers, and nothing of the data."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from slicecast.convert.errors import (
    ConfigError,
    DuplicateTensorError,
    HeaderError,
    PlanErrors,
    SlicecastError,
)
from slicecast.convert.source.index import (
    INDEX,
    MAX_JSON_BYTES,
    duplicate_errors,
    files_without_index,
    index_errors,
    parse_index,
)
from slicecast.convert.source.reader import Reader, Span
from slicecast.convert.source.safetensors_header import (
    PREFIX_BYTES,
    RepeatedKeyError,
    TensorInfo,
    clip,
    header_nbytes,
    load_json,
    parse_header,
)
from slicecast.convert.source.storage import Storage, open_storage

CONFIG = "config.json"
# Where tools announce a quantization outside `config.json`: ModelOpt, AutoGPTQ, AutoAWQ.
SIDE_CONFIGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Parts of each file that `sample_contents` reads, evenly spread, and their length in bytes.
SAMPLES = 8
SAMPLE_BYTES = 4096
# Headers in memory at once. Each of Kimi-K2.6's is 0.5 MB; the format allows 100 MB.
FILES_AT_ONCE = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
      storage: where the files are.
      config: the content of `config.json`.
      tensors: every tensor of the checkpoint by name, sorted by name.
      file_sizes: length in bytes of every file that holds tensors, by file name.
      side_configs: the contents of those files among `SIDE_CONFIGS` that exist, by file name.
    """

    storage: Storage
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    file_sizes: Mapping[str, int]
    side_configs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The directory, or another name that finds the same files again."""
        return self.storage.path

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def sample_contents(checkpoint: Checkpoint) -> str:
    """SHA-256, in hexadecimal, of a few small parts of each file.

    It tells checkpoints apart that have the same headers, such as two steps of one training. It reads 32 KiB a file.
    """
    sha = hashlib.sha256()
    reader = Reader(checkpoint.storage)
    for file, size in checkpoint.file_sizes.items():
        step = max(size // SAMPLES, 1)
        starts = range(0, size, step)
        spans = [Span(file, start, min(SAMPLE_BYTES, size - start)) for start in starts]
        for data in reader.read(spans):
            sha.update(data.tobytes())
    return sha.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns a hex SHA-256 of all that a plan can depend on: configs, file sizes, and every tensor's place.

    Neither the path nor the order of the mappings matters, so that every host of a slice gets the same value. The
    tensors' data are not read.
    """
    content = (
        checkpoint.config,
        checkpoint.side_configs,
        sorted(checkpoint.file_sizes.items()),
        sorted((t.name, t.file, t.dtype, t.shape, t.offset) for t in checkpoint.tensors.values()),
    )
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Reads the configs, the index and all headers of a checkpoint.

    With `model.safetensors.index.json`, the files that it names are the checkpoint; others are left alone. Without it,
    all `*.safetensors` files of the directory are.

    Args:
      path: a directory, a URL, or a repository of the Hub; see `storage.py`.
      revision: a branch, tag or commit of the repository.

    Raises:
      UsageError: `path` is of no kind that can be read.
      MissingFileError, ReadError: there is no such directory, or it cannot be listed.
      PlanErrors: everything that is wrong with the files, one error each: MissingFileError, ConfigError, HeaderError,
        TruncatedFileError, OffsetError, DuplicateTensorError, UnsupportedFormatError, ReadError.
    """
    checkpoint, errors = read_checkpoint(open_storage(path, revision))
    if errors:
        raise PlanErrors(errors)
    return checkpoint


def read_checkpoint(storage: Storage) -> tuple[Checkpoint, list[SlicecastError]]:
    """What can be read of a checkpoint, and everything that is wrong with its files; see `open_checkpoint`.

    Raises:
      MissingFileError, ReadError: there is no such directory, or it cannot be listed.
    """
    present = storage.names()
    reader, errors = Reader(storage), list[SlicecastError]()
    configs: dict[str, Any] = {}
    for name in (CONFIG, *sorted(present.intersection(SIDE_CONFIGS))):
        with _collected(errors):
            configs[name] = _read_json(reader, name, ConfigError)
    tensors: list[TensorInfo] = []
    file_sizes: dict[str, int] = {}
    with _collected(errors):
        index = parse_index(_read_json(reader, INDEX, HeaderError), present) if INDEX in present else None
        files = sorted(present.intersection(index.values())) if index else files_without_index(storage.path, present)
        file_sizes, tensors = _read_headers(reader, files, errors)
        errors += duplicate_errors(tensors)
        if index is not None:
            errors += index_errors(index, present, file_sizes, tensors)
    by_name = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.name)}
    return Checkpoint(storage, configs.pop(CONFIG, {}), by_name, file_sizes, configs), errors


@contextmanager
def _collected(errors: list[SlicecastError]) -> Iterator[None]:
    """Adds an error of the block to `errors`, so that the user sees the next ones too."""
    try:
        yield
    except SlicecastError as error:
        errors.append(error)


def _read_json(reader: Reader, file: str, kind: type[ConfigError] | type[HeaderError]) -> dict[str, Any]:
    """Returns the JSON object in `file`; `kind` is raised if there is none."""
    size = reader.storage.size(file)
    if size > MAX_JSON_BYTES:
        raise kind(f"{file}: found {size} bytes, expected at most {MAX_JSON_BYTES} of JSON. Download it again.")
    (data,) = reader.read([Span(file, 0, size)])
    try:
        content = load_json(data.tobytes())
    except RepeatedKeyError as error:
        if kind is HeaderError:
            raise DuplicateTensorError(
                f"{file}: found the key {clip(error.key)} more than once, expected each tensor once. Download it again."
            ) from None
        raise kind(f"{file}: found that {error}, expected each key once. Download it again.") from None
    except ValueError as error:
        raise kind(f"{file}: found text that is not JSON ({error}), expected JSON. Download it again.") from None
    if not isinstance(content, dict):
        raise kind(f"{file}: found a {type(content).__name__}, expected a JSON object. Download it again.")
    return content


def _read_headers(
    reader: Reader, files: Sequence[str], errors: list[SlicecastError]
) -> tuple[dict[str, int], list[TensorInfo]]:
    """Returns sizes and tensors of the files that are in order; adds what is wrong with the others to `errors`."""
    sizes: dict[str, int] = {}
    tensors: list[TensorInfo] = []
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            batch = files[start : start + FILES_AT_ONCE]
            for file, pending in zip(batch, [pool.submit(_read_header, reader, file) for file in batch], strict=True):
                with _collected(errors):
                    size, header = pending.result()
                    tensors += parse_header(header, file=file, file_size=size)
                    sizes[file] = size
    return sizes, tensors


def _read_header(reader: Reader, file: str) -> tuple[int, bytes]:
    """Returns the file's size and its JSON header, in two reads."""
    size = reader.storage.size(file)
    (prefix,) = reader.read([Span(file, 0, min(PREFIX_BYTES, size))])
    nbytes = header_nbytes(prefix.tobytes(), file=file, file_size=size)
    (header,) = reader.read([Span(file, PREFIX_BYTES, nbytes)])
    return size, header.tobytes()
