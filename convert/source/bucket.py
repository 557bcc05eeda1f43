"""A path in a bucket: `gs://` or `s3://`.

Bytes come through TensorStore, which repeats what a bucket answers with 429 or 5xx, and holds no lock of the
interpreter. Listing goes through `etils.epath`, with which Orbax writes to buckets too; it takes gcsfs for `gs://`
and s3fs for `s3://`.

Both find credentials for S3 where AWS' own tools do: in `AWS_ACCESS_KEY_ID` and its companions, in the profile
`AWS_PROFILE` of `~/.aws`, or from the machine's role. `FSSPEC_S3_ANON=true`, a setting of s3fs, stands for none: a
public bucket. TensorStore asks AWS for the region of a bucket. `AWS_ENDPOINT_URL` names another service that speaks S3,
such as MinIO, R2 or Ceph; there a bucket is a part of the path, and its region is `AWS_DEFAULT_REGION`.
"""

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import fsspec.config
import tensorstore as ts
from etils import epath

from slicecast.convert.errors import MissingFileError, ReadError, UsageError
from slicecast.convert.source.storage import (
    ByteRange,
    changed_error,
    check_package,
    missing_error,
    read_error,
    scatter,
)


class Bucket:
    """The objects directly below a path in a bucket."""

    def __init__(self, path: str):
        self._path = path.rstrip("/")
        check_package(self._path)
        try:
            self._specification = _specification(f"{self._path}/")
        except ValueError as error:
            raise UsageError(f"{path}: found {error}, expected the URL of a path in a bucket.") from error
        self._generations: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _store(self) -> Any:
        """Opened for the first read: listing is better at saying that there are no credentials."""
        return ts.KvStore.open(self._specification).result()

    @property
    def path(self) -> str:
        """The URL."""
        return self._path

    def names(self) -> frozenset[str]:
        """The objects' names."""
        try:
            found = frozenset(child.name for child in epath.Path(self._path).iterdir())
        except FileNotFoundError:
            found = frozenset()
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
            raise read_error(wanted, 0, _cause(error)) from error
        if result.state != "value":
            raise read_error(wanted, 0, "there is no such file")
        if len(result.value) != wanted.nbytes:
            raise read_error(wanted, len(result.value), "storage delivered another number of bytes")
        with self._lock:
            first = self._generations.setdefault(wanted.file, result.stamp.generation)
        if first != result.stamp.generation:
            raise changed_error(wanted.file, first, result.stamp.generation)
        scatter(memoryview(result.value), targets)


def _specification(url: str) -> Any:
    """What TensorStore opens a URL with. Of AWS' variables it reads only those of credentials."""
    if not url.startswith("s3://"):
        return ts.KvStore.Spec(url)
    bucket, _, path = url.removeprefix("s3://").partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    # The names of AWS' tools, in their order.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint.rstrip("/")
        if region := os.environ.get("AWS_DEFAULT_REGION"):
            found["aws_region"] = region
    # TensorStore would come to the same in both cases, but complain first that there is no ~/.aws.
    if fsspec.config.conf.get("s3", {}).get("anon"):
        found["aws_credentials"] = {"type": "anonymous"}
    elif "AWS_ACCESS_KEY_ID" in os.environ:
        found["aws_credentials"] = {"type": "environment"}
    return ts.KvStore.Spec(found)


def _cause(error: Exception) -> str:
    """What TensorStore says without the response's body, in which S3 repeats a token that has expired."""
    return str(error).partition(" [http_response_")[0].rstrip(".")
