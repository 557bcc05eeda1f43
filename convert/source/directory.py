"""A directory: a disk, NFS, a mounted bucket. Bytes go straight into the arrays that the caller gets."""

import os
from collections.abc import Sequence
from urllib.parse import unquote

from slicecast.convert.errors import MissingFileError, ReadError
from slicecast.convert.source.storage import ByteRange, missing_error, read_error


class Directory:
    """The files of a directory."""

    def __init__(self, path: str):
        self._path = unquote(path.removeprefix("file://")) if path.startswith("file://") else path

    @property
    def path(self) -> str:
        """The directory, from the root: it is recorded, and read again from elsewhere."""
        return os.path.abspath(self._path)

    def names(self) -> frozenset[str]:
        """All files and folders in it."""
        if not os.path.isdir(self._path):
            raise MissingFileError(
                f"{self._path}: found {'a file' if os.path.exists(self._path) else 'nothing'}, expected a directory "
                f"with config.json and safetensors files. Give the directory that the checkpoint was downloaded to, or "
                f"the name of a repository of the Hugging Face Hub."
            )
        try:
            return frozenset(os.listdir(self._path))
        except OSError as error:
            raise ReadError(
                f"{self._path}: found {error}, expected a readable directory. Check its permissions."
            ) from error

    def size(self, file: str) -> int:
        """The length of a file."""
        try:
            return os.path.getsize(os.path.join(self._path, file))
        except FileNotFoundError:
            raise missing_error(self._path, file) from None
        except OSError as error:
            raise ReadError(f"{file}: found {error}, expected a readable file. Check its permissions.") from error

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """Reads with `preadv`."""
        left, got = list(targets), 0
        try:
            descriptor = os.open(os.path.join(self._path, wanted.file), os.O_RDONLY)
            try:
                while left:
                    count = os.preadv(descriptor, left, wanted.offset + got)
                    if count == 0:
                        raise read_error(wanted, got, f"the file ends at byte {wanted.offset + got}")
                    got += count
                    left = _after(left, count)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise read_error(wanted, got, str(error)) from error


def _after(targets: list[memoryview], count: int) -> list[memoryview]:
    """Drops the first `count` bytes: the kernel may deliver less than it was asked for (2 GiB a call on Linux)."""
    for done, target in enumerate(targets):
        if count < len(target):
            return [target[count:], *targets[done + 1 :]]
        count -= len(target)
    return []
