"""A path in a bucket: `gs://`.

Bytes come through TensorStore, which repeats what a bucket answers with 429 or 5xx, and holds no lock of the
interpreter. Listing goes through `etils.epath`, with which Orbax writes to buckets too.
"""

import threading
from collections.abc import Sequence

import tensorstore as ts
from etils import epath

from slicecast.convert.errors import MissingFileError, ReadError
from slicecast.convert.source.storage import ByteRange, changed_error, missing_error, read_error, scatter


class Bucket:
    """The objects directly below a path in a bucket."""

    def __init__(self, path: str):
        self._path = path.rstrip("/")
        self._store = ts.KvStore.open(f"{self._path}/").result()
        self._generations: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """The URL."""
        return self._path

    def names(self) -> frozenset[str]:
        """The objects' names."""
        try:
            found = frozenset(child.name for child in epath.Path(self._path).iterdir())
        except Exception as error:  # Each backend of epath has its own.
            raise ReadError(
                f"{self._path}: cannot be listed ({error}). Check the name and your credentials."
            ) from error
        if not found:
            raise MissingFileError(f"{self._path}: found nothing, expected config.json and safetensors files.")
        return found

    def size(self, file: str) -> int:
        """The length of an object."""
        try:
            return int(epath.Path(f"{self._path}/{file}").stat().length)
        except FileNotFoundError:
            raise missing_error(self._path, file) from None
        except Exception as error:
            raise ReadError(f"{file}: found {error}, expected a readable object. Check your credentials.") from error

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """Reads a range of an object, of the generation that was read first."""
        byte_range = slice(wanted.offset, wanted.offset + wanted.nbytes)
        try:
            result = self._store.read(wanted.file, byte_range=byte_range).result()
        except Exception as error:  # TensorStore maps a status to one of many built-in types.
            raise read_error(wanted, 0, str(error)) from error
        if result.state != "value":
            raise read_error(wanted, 0, "there is no such file")
        if len(result.value) != wanted.nbytes:
            raise read_error(wanted, len(result.value), "storage delivered another number of bytes")
        with self._lock:
            first = self._generations.setdefault(wanted.file, result.stamp.generation)
        if first != result.stamp.generation:
            raise changed_error(wanted.file, first, result.stamp.generation)
        scatter(memoryview(result.value), targets)
