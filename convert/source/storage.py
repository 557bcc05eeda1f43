"""Where a checkpoint's files lie: a directory, a bucket, a web server, or the Hugging Face Hub.

    /data/Kimi-K2.6, file:///data/Kimi-K2.6     a directory                       `directory.py`
    gs://bucket/path, s3://bucket/path          a bucket                          `bucket.py`
    https://host/path                           a directory of a web server       `web.py`
    org/name, hf://org/name, hf://org/name@REV  a repository of the Hub           `hub.py`

All are read by byte ranges; nothing is copied to a local disk.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from slicecast.convert.errors import MissingFileError, ReadError, UsageError

# What the Hub calls a repository: an owner and a name.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

# The package through which `etils.epath` lists a bucket, by scheme, and the extra of ours that installs it.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Adjacent bytes of one file.

    Attributes:
      file: name relative to the checkpoint's directory.
      offset: position of the first byte.
      nbytes: length in bytes.
    """

    file: str
    offset: int
    nbytes: int


class Storage(Protocol):
    """The files of one checkpoint. Used from several threads."""

    @property
    def path(self) -> str:
        """What opens this storage again, and finds the same files: a branch of the Hub has become a commit."""

    def names(self) -> frozenset[str]:
        """The names of the files, or of those that may be there where there is no list.

        Raises:
          MissingFileError, ReadError: there is nothing, or it cannot be listed.
        """

    def size(self, file: str) -> int:
        """The length of a file in bytes.

        Raises:
          MissingFileError, ReadError: there is no such file, or storage failed.
        """

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """Reads bytes into `targets`, one after the other, which are as long as the range together.

        Raises:
          ReadError: storage failed, the file ends earlier, or it is not the file that it was.
        """


def open_storage(path: str, revision: str | None = None) -> Storage:
    """The storage that a path, a URL or a name on the Hub stands for.

    Args:
      path: as the module describes.
      revision: a branch, tag or commit; only on the Hub.

    Raises:
      UsageError: it stands for nothing that can be read, or a revision is given elsewhere.
      MissingFileError, ReadError: it is not there, or not for this user.
    """
    # Modules are imported here, so that a conversion from a directory does not load what only others need.
    scheme, separator, rest = path.partition("://")
    if not separator:
        is_repository = not os.path.exists(path) and _REPOSITORY.fullmatch(path)
        scheme, rest = ("hf" if is_repository else "file"), path
    if scheme == "hf":
        from slicecast.convert.source.hub import Repository

        name, _, commit = rest.rstrip("/").partition("@")
        return Repository(name, revision or commit or None)
    if revision is not None:
        raise UsageError(f"--revision={revision}: {path} is no repository of the Hugging Face Hub; only those have it.")
    if scheme == "file":
        from slicecast.convert.source.directory import Directory

        return Directory(path)
    if scheme in ("gs", "s3"):
        from slicecast.convert.source.bucket import Bucket

        return Bucket(path)
    if scheme in ("http", "https"):
        from slicecast.convert.source.web import WebDirectory

        return WebDirectory(path)
    raise UsageError(f"{path}: '{scheme}://' cannot be read; a directory, gs://, s3://, https:// and hf:// can.")


def check_package(url: str) -> None:
    """Checks that what lists a bucket is installed.

    Raises:
      UsageError: it is not.
    """
    package, extra = _PACKAGES.get(url.partition("://")[0], (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(f"{url}: {package} is not installed. Run `pip install 'slicecast[{extra}]'`.")


def read_error(wanted: ByteRange, got: int, cause: str) -> ReadError:
    """The error for a range of which only some bytes came."""
    return ReadError(
        f"{wanted.file}: bytes [{wanted.offset}, {wanted.offset + wanted.nbytes}): found {got} bytes, expected "
        f"{wanted.nbytes}: {cause}. Check that the file is complete, readable and not being changed, then run the "
        f"same command again."
    )


def changed_error(file: str, before: object, now: object) -> ReadError:
    """The error for a file that is another one than at first."""
    return ReadError(
        f"{file}: the file has been replaced since this run began to read it (it was {before}, it is {now}). Wait "
        "until it is complete, then run the command again; what was written from the old file will not be taken over."
    )


def missing_error(path: str, file: str) -> MissingFileError:
    """The error for a file that is not there."""
    return MissingFileError(f"{file}: found no such file in {path}, expected one. Download it into that directory.")


def scatter(data: memoryview, targets: Sequence[memoryview]) -> None:
    """Copies data into targets, one after the other."""
    for target in targets:
        target[:], data = data[: len(target)], data[len(target) :]
