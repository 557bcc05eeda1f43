"""A directory of a web server: `http://` or `https://`.

There is no list of its files, so that those are found that a checkpoint usually has: its configs, and one file of
weights or the index of several.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from slicecast.convert.errors import MissingFileError, ReadError
from slicecast.convert.source.http import request, without_query
from slicecast.convert.source.index import INDEX, MAX_JSON_BYTES, SINGLE
from slicecast.convert.source.safetensors_header import load_json
from slicecast.convert.source.storage import ByteRange, changed_error, missing_error, read_error, scatter

# Files other than weights that a checkpoint may have.
_OTHERS = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")


class WebDirectory:
    """The files directly below an address."""

    def __init__(self, path: str):
        self._path = path.rstrip("/")

    @property
    def path(self) -> str:
        """The address."""
        return self._path

    def names(self) -> frozenset[str]:
        """The configs that are there, and the files of weights that the index names, or the only one."""
        found = {name for name in (*_OTHERS, INDEX, SINGLE) if self._headers(name) is not None}
        if INDEX in found and self.size(INDEX) <= MAX_JSON_BYTES:
            text = self._request("GET", INDEX, {}).content
            # Whoever reads the index says what is wrong with it.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                found.update(map(str, load_json(text)["weight_map"].values()))
        if not found:
            raise MissingFileError(f"{self._path}: found none of {', '.join((*_OTHERS[:1], INDEX, SINGLE))} there.")
        return frozenset(found)

    def size(self, file: str) -> int:
        """The length of a file."""
        headers = self._headers(file)
        if headers is None:
            raise missing_error(self._path, file)
        if "content-length" not in headers:
            raise ReadError(f"{file}: {self._path} does not say how long it is, so it cannot be read by ranges.")
        return int(headers["content-length"])

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """Reads a range, of the file that the first request found."""
        last = wanted.offset + wanted.nbytes - 1
        answer = self._request("GET", wanted.file, {"Range": f"bytes={wanted.offset}-{last}"})
        if answer.status_code != 206:
            raise read_error(wanted, 0, f"the server answers a request for a range with status {answer.status_code}")
        before = (self._headers(wanted.file) or {}).get("etag")
        if answer.headers.get("etag") != before:
            raise changed_error(wanted.file, before, answer.headers.get("etag"))
        if len(answer.content) != wanted.nbytes:
            raise read_error(wanted, len(answer.content), "the server delivered another number of bytes")
        scatter(memoryview(answer.content), targets)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  There is one of these for as long as the program runs.
    def _headers(self, file: str) -> dict[str, str] | None:
        """What the server says about a file when it is first asked; None if it is not there."""
        answer = self._request("HEAD", file, {})
        if answer.status_code in (403, 404, 410):
            return None
        if answer.status_code != 200:
            raise ReadError(f"{file}: {self._path} answers with status {answer.status_code}. Check the address.")
        return {name.lower(): value for name, value in answer.headers.items()}

    def _request(self, method: str, file: str, headers: dict[str, str]) -> Any:
        try:
            return request(method, f"{self._path}/{file}", headers)
        except Exception as error:
            raise ReadError(
                f"{file}: {self._path} cannot be read ({without_query(error)}). Check the address and the network "
                "(HTTPS_PROXY names a proxy), then run the same command again."
            ) from error
