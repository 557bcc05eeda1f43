"""A repository of the Hugging Face Hub, read by ranges.

The revision becomes a commit at the start, so that a branch that moves cannot mix two states. Where a file's bytes lie
is asked once: the Hub answers with a signed address that is valid for some time, and is asked again when it is not.
`huggingface_hub` finds the token (HF_TOKEN, or the one of `hf auth login`) and the endpoint (HF_ENDPOINT), and repeats
requests that are answered with 429 or 5xx, or not at all.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import HfApi, HfFileMetadata, ModelInfo, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # Documented, not re-exported.

from slicecast.convert.errors import MissingFileError, ReadError, SlicecastError
from slicecast.convert.source.http import TIMEOUT_SECONDS, request, until_answered, without_query
from slicecast.convert.source.storage import ByteRange, changed_error, missing_error, read_error, scatter

# How often an address that has run out is asked for again, for one range: once is enough unless clocks differ.
_FRESH_ADDRESSES = 3

# What storage behind the Hub answers for an address that is no longer valid.
_EXPIRED = (400, 401, 403, 404)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a file's bytes lie for now.

    Attributes:
      url: the address.
      etag: what tells this content from any other.
    """

    url: str
    etag: str | None


class Repository:
    """The files of one commit of a repository."""

    def __init__(self, name: str, revision: str | None = None):
        """Asks the Hub for the commit and its files.

        Raises:
          MissingFileError, ReadError: there is no such repository or revision, or not for this user.
        """
        self._name = name
        try:
            info = _model_info(name, revision)
        except Exception as error:  # Beside the Hub's own errors, those of its HTTP library.
            raise _hub_error(name, revision, error) from error
        self._commit = str(info.sha)
        self._sizes = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or ()}
        self._addresses: dict[str, _Address] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """The repository and its commit."""
        return f"hf://{self._name}@{self._commit}"

    def names(self) -> frozenset[str]:
        """All files at the top of the repository."""
        return frozenset(name for name in self._sizes if "/" not in name)

    def size(self, file: str) -> int:
        """The length of a file."""
        if file not in self._sizes:
            raise missing_error(self.path, file)
        return self._sizes[file]

    def read(self, wanted: ByteRange, targets: Sequence[memoryview]) -> None:
        """Reads a range from where the Hub says that the file is."""
        last = wanted.offset + wanted.nbytes - 1
        for fresh in range(_FRESH_ADDRESSES):
            address = self._address(wanted.file, again=fresh > 0)
            headers = {"Range": f"bytes={wanted.offset}-{last}"}
            if urlsplit(address.url).netloc == urlsplit(constants.ENDPOINT).netloc:
                # The token is for the Hub alone: other hosts get what they need with the address.
                headers = build_hf_headers(headers=headers)
            try:
                answer = request("GET", address.url, headers)
            except Exception as error:
                raise read_error(wanted, 0, without_query(error)) from None
            if answer.status_code in _EXPIRED:
                continue
            data = memoryview(answer.content)
            if answer.status_code == 200:  # Small files come whole.
                data = data[wanted.offset : last + 1]
            elif answer.status_code != 206:
                raise read_error(wanted, 0, f"the Hub's storage answers with status {answer.status_code}")
            if len(data) != wanted.nbytes:
                raise read_error(wanted, len(data), "the Hub's storage delivered another number of bytes")
            scatter(data, targets)
            return
        raise read_error(wanted, 0, f"the Hub's addresses for it are refused with status {answer.status_code}")

    def _address(self, file: str, *, again: bool) -> _Address:
        with self._lock:
            before = self._addresses.get(file)
            if before is not None and not again:
                return before
            url = hf_hub_url(self._name, file, revision=self._commit)
            try:
                found = _metadata(url)
            except Exception as error:
                raise _hub_error(self._name, self._commit, error) from error
            if found.commit_hash not in (None, self._commit):
                raise changed_error(file, self._commit, found.commit_hash)
            if before is not None and before.etag != found.etag:
                raise changed_error(file, before.etag, found.etag)
            self._addresses[file] = _Address(found.location, found.etag)
            return self._addresses[file]


@until_answered
def _model_info(name: str, revision: str | None) -> ModelInfo:
    return HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)


@until_answered
def _metadata(url: str) -> HfFileMetadata:
    return get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)


def _hub_error(name: str, revision: str | None, error: Exception) -> SlicecastError:
    """What the Hub's refusals mean, and what to do."""
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        return ReadError(
            f"{name}: this repository is gated. Ask for access at {page}, then give a token with --hf_access_token or "
            "HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingFileError(
            f"{name}: there is no revision '{revision}'. See {page}/tree/main for those that there are."
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return MissingFileError(
            f"{name}: found no directory and no repository of this name at {constants.ENDPOINT}. Check the name; if it "
            "is private, give a token with --hf_access_token or HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError):
        return ReadError(f"{name}: the Hub answers: {without_query(error)}. Run the same command again.")
    if isinstance(error, OfflineModeIsEnabled):
        return MissingFileError(
            f"{name}: found no directory of this name, and the Hub is not asked, because HF_HUB_OFFLINE is set. Unset "
            f"it, or give the directory of a copy, as `hf download {name}` prints it."
        )
    return ReadError(
        f"{name}: the Hub at {constants.ENDPOINT} cannot be reached ({without_query(error)}). Check the network; "
        "HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror of the Hub. Or give the directory of a copy. Then run the "
        "same command again."
    )
