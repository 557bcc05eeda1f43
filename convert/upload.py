"""Output to the Hugging Face Hub: a checkpoint is converted into a staging directory on one host, then uploaded.

    <staging>/0/items/                  the finished checkpoint, as in any other output (`output.py`)
    hf://org/name: 0/items/             the same files, byte for byte, and the summary beside them

Files are committed in batches, data first. The last commit adds the files that make a checkpoint of the data
(`_is_index`) and removes what is left of earlier ones, provided that nobody has changed the repository since all data
was found there, by its hashes. Until then nothing in it can be loaded, and two uploads cannot mix.

An interrupted upload goes on where it stopped, without a record of its own: files that are there are known by their
size and SHA-256, and what was sent but not committed is known to the Hub.

`huggingface_hub` hashes, sends (through `hf_xet` where it is installed, otherwise by Git LFS) and commits. Its uploads
of whole folders do not suit every version that we support: `upload_large_folder` tries for ever what is refused, and is
gone in 2.0; `upload_folder` makes one commit of everything before 1.20, and without `hf_xet`. All stand on
`create_commit`, and so do we.

The Hub recommends at most 100,000 files, 10,000 in a folder, 20 GB in a file, and 100 files in a commit
(https://huggingface.co/docs/hub/storage-limits). A wave, of 512 MiB (`memory.MAX_BOX_BYTES`), leaves one or two files
in a database: its chunks, and nodes of the tree. 2 TB are 3,700 waves, so at most 7,500 files of at most 512 MiB in
the folders of up to four databases, and 100 commits. Without OCDBT each chunk is a file, which can be too many.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # Documented, not re-exported.
    disable_progress_bars,
    get_session,
    validate_repo_id,
)

from slicecast.convert.errors import OutputError, SlicecastError, StorageError, UsageError
from slicecast.convert.memory import GB
from slicecast.convert.orbax_checkpoint import STEP, read_own_metadata
from slicecast.convert.output import SUMMARY_FILE
from slicecast.convert.source.http import TIMEOUT_SECONDS, until_answered, without_query

SCHEME = "hf://"

# What the Hub recommends; see above.
_MAX_FILES = 100_000
_MAX_FILES_OF_COMMIT = 100

# An attempt that fails reads the files of one commit again, and progress is shown after each; 2 TB take 100 of them.
_MAX_BYTES_OF_COMMIT = 20 * GB

# The library waits without end for an answer. The slowest are those to commits, of a minute or so.
_ANSWER_SECONDS = 600

# Files that are hashed or sent at once. A core hashes one or two gigabytes a second, and fast disks give ten.
_THREADS = 8

_METADATA_FILE = f"{STEP}/_CHECKPOINT_METADATA"


@dataclass(frozen=True)
class UploadProgress:
    """How far an upload is.

    Attributes:
        files: Files of data in the repository.
        total_files: Files of data of the checkpoint.
        nbytes: Bytes in the repository.
        total_bytes: Bytes of the checkpoint.
        sent_bytes: Those of `nbytes` that this upload committed.
        seconds: Time since it began.
    """

    files: int
    total_files: int
    nbytes: int
    total_bytes: int
    sent_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.sent_bytes / GB / max(self.seconds, 1e-9)
        return (
            f"upload {self.nbytes / GB:.2f} of {self.total_bytes / GB:.2f} GB ({rate:.2f} GB/s)"
            f"  {self.files} of {self.total_files} files"
        )


@dataclass(frozen=True)
class HubOutput:
    """A repository that a checkpoint goes to.

    Attributes:
        name: The repository, as `org/name`.
        staging: The local directory that the checkpoint is converted into.
    """

    name: str
    staging: Path

    def begin(self, digest: str, *, files: int, overwrite: bool) -> bool:
        """Makes sure, before anything is converted, that the checkpoint can be uploaded; makes a repository if need be.

        Args:
            digest: The digest of source, plan and format.
            files: How many files the checkpoint will have, about.
            overwrite: Whether another finished checkpoint in the repository may be replaced.

        Returns:
            Whether the finished checkpoint of this digest is in the repository already.

        Raises:
            OutputError: If it cannot be uploaded.
        """
        if files > _MAX_FILES:
            raise OutputError(
                f"{self.name}: the checkpoint would have {files} files, and the Hub takes {_MAX_FILES}. Leave out "
                "--checkpoint_storage_use_ocdbt=false, or give a directory or gs://bucket/path."
            )
        with self._errors_explained():
            until_answered(self._claim)()
            return self._is_finished(*until_answered(self._look)(), digest, overwrite=overwrite)

    def upload(self, report: Callable[[UploadProgress], None], *, overwrite: bool) -> None:
        """Uploads the finished checkpoint in the staging directory, or what of it is not in the repository yet.

        Args:
            report: Called at the beginning, and after each commit.
            overwrite: Whether another finished checkpoint in the repository may be replaced.

        Raises:
            OutputError: If it cannot be uploaded.
        """
        digest = str(read_own_metadata(epath.Path(self.staging) / STEP)["digest"])
        files = self._files()
        data = {path: nbytes for path, nbytes in files.items() if not _is_index(path)}
        with self._errors_explained():
            commit, present = until_answered(self._look)()
            if self._is_finished(commit, present, digest, overwrite=overwrite):
                return
            if overwrite:
                until_answered(self._withdraw)()
            hashes: dict[str, str] = {}
            missing = {path: data[path] for path in self._differing(data, present, hashes)}
            files_there = len(data) - len(missing)
            bytes_there = sum(data.values()) - sum(missing.values())
            start, sent = time.monotonic(), 0

            def progress() -> UploadProgress:
                return UploadProgress(
                    files_there, len(data), bytes_there + sent, sum(data.values()), sent, time.monotonic() - start
                )

            report(progress())
            for batch in _batches(missing):
                hashes |= until_answered(self._add)(batch)
                files_there += len(batch)
                sent += sum(missing[path] for path in batch)
                report(progress())
            until_answered(self._publish)(files, hashes)
            self._require(files, until_answered(self._look)()[1], hashes)

    def _files(self) -> dict[str, int]:
        """The files to upload, by their paths in the repository, with their sizes."""
        found = [path for path in (self.staging / STEP).rglob("*") if path.is_file()]
        found += [path for path in [self.staging / SUMMARY_FILE] if path.exists()]
        return {path.relative_to(self.staging).as_posix(): path.stat().st_size for path in sorted(found)}

    def _differing(self, paths: Iterable[str], present: Mapping[str, RepoSibling], hashes: dict[str, str]) -> list[str]:
        """Those of the files that are not in the repository, or with another content.

        Args:
            paths: The files.
            present: What is in the repository.
            hashes: The SHA-256 of files that were read before; those that are read now are added.
        """

        def differs(path: str) -> bool:
            file, known = self.staging / path, present.get(path)
            if known is None or known.size != file.stat().st_size:
                return True
            if known.lfs is None:  # A small file, in Git itself.
                content = file.read_bytes()
                return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest() != known.blob_id
            if path not in hashes:
                with open(file, "rb") as opened:
                    hashes[path] = hashlib.file_digest(opened, "sha256").hexdigest()
            return hashes[path] != known.lfs.sha256

        paths = list(paths)
        with ThreadPoolExecutor(_THREADS) as pool:
            return [path for path, found in zip(paths, pool.map(differs, paths), strict=True) if found]

    def _claim(self) -> None:
        try:
            _api().auth_check(self.name, write=True)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            # Whoever wants to can make it public. What has once been public cannot be taken back.
            _api().create_repo(self.name, private=True)

    def _look(self) -> tuple[str, dict[str, RepoSibling]]:
        """The newest commit, and its files."""
        info = _api().model_info(self.name, files_metadata=True, timeout=TIMEOUT_SECONDS)
        return str(info.sha), {sibling.rfilename: sibling for sibling in info.siblings or ()}

    def _is_finished(self, commit: str, present: Mapping[str, RepoSibling], digest: str, *, overwrite: bool) -> bool:
        """Whether a commit has the finished checkpoint of this digest; another one is an error, or to be replaced."""
        if not any(_is_of_checkpoint(path) and _is_index(path) for path in present):
            return False
        if _METADATA_FILE in present and until_answered(self._metadata)(commit).get("digest") == digest:
            return True
        if not overwrite:
            raise OutputError(
                f"{SCHEME}{self.name}: there is a finished checkpoint of another source, or with other flags. Give "
                "another --base_output_directory, or --overwrite."
            )
        return False

    def _metadata(self, commit: str) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            hf_hub_download(self.name, _METADATA_FILE, revision=commit, local_dir=directory)
            return read_own_metadata(epath.Path(directory) / STEP)

    def _add(self, paths: Sequence[str]) -> dict[str, str]:
        """Sends and commits files; returns their SHA-256."""
        with ThreadPoolExecutor(_THREADS) as pool:  # The oldest versions hash each file as they take note of it.
            additions = list(pool.map(self._addition, paths))
        _api().create_commit(
            self.name, additions, commit_message=f"Data of a checkpoint, {len(paths)} files", num_threads=_THREADS
        )
        return {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions}

    def _addition(self, path: str) -> CommitOperationAdd:
        return CommitOperationAdd(path, self.staging / path)

    def _withdraw(self) -> None:
        """Removes the files that make a checkpoint of data, first, so that what is left of it never looks whole."""
        commit, present = self._look()
        if index := [path for path in present if _is_of_checkpoint(path) and _is_index(path)]:
            _api().create_commit(
                self.name,
                [CommitOperationDelete(path) for path in index],
                commit_message="Withdraw a checkpoint that is replaced",
                parent_commit=commit,
            )

    def _publish(self, files: Iterable[str], hashes: dict[str, str]) -> None:
        """Makes a checkpoint of the data in the repository; changes nothing where an earlier attempt has done it."""
        commit, present = self._look()
        self._require([path for path in files if not _is_index(path)], present, hashes)
        left_over = [path for path in present if _is_of_checkpoint(path) and path not in files]
        _api().create_commit(
            self.name,
            [
                *(CommitOperationDelete(path) for path in left_over),
                *(self._addition(path) for path in files if _is_index(path)),
            ],
            commit_message="Checkpoint",
            parent_commit=commit,
        )

    def _require(self, paths: Iterable[str], present: Mapping[str, RepoSibling], hashes: dict[str, str]) -> None:
        if differing := self._differing(paths, present, hashes):
            raise OutputError(
                f"{SCHEME}{self.name}: {len(differing)} files were uploaded but are not there, or with another "
                f"content, among them {differing[:3]}. Make sure that nobody else uploads there, and that the "
                "repository has no .gitignore; then run the same command again: it goes on."
            )

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        disable_progress_bars()  # Those of each file; we report each commit.
        try:
            yield
        except SlicecastError:
            raise
        except Exception as error:  # Beside the Hub's own errors, those of its HTTP library and of hf_xet.
            raise _output_error(self.name, error) from error


def open_hub_output(url: str, staging_directory: str | None = None) -> HubOutput:
    """The repository that a flag names, and where a checkpoint for it is staged: below `~/.cache/slicecast` by default.

    Raises:
        UsageError: If it names none.
    """
    name = url.removeprefix(SCHEME).rstrip("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise UsageError(f"{url}: this names no repository. Give hf://org/name.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return HubOutput(name, Path(os.path.abspath(staging_directory or cache / "slicecast" / name)))


def _is_of_checkpoint(path: str) -> bool:
    """Whether a file in a repository belongs to a checkpoint, and not to a model card or the like."""
    return path.startswith(f"{STEP}/")


def _is_index(path: str) -> bool:
    """Whether a file makes a checkpoint of the data: the metadata of step and item, the merged database's manifest."""
    return path.count("/") <= f"{STEP}/items/manifest.ocdbt".count("/")


def _batches(files: Mapping[str, int]) -> Iterator[list[str]]:
    """The files, so many together as make one commit."""
    batch: list[str] = []
    total = 0
    for path, nbytes in files.items():
        if batch and (len(batch) == _MAX_FILES_OF_COMMIT or total + nbytes > _MAX_BYTES_OF_COMMIT):
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += nbytes
    if batch:
        yield batch


def _api() -> HfApi:
    get_session().timeout = _ANSWER_SECONDS
    return HfApi()


def _output_error(name: str, error: BaseException) -> OutputError:
    """What the Hub's refusals mean, and what to do."""
    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return OutputError(f"{SCHEME}{name}: this repository is gated. Ask for access at {hub}/{name}.")
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:  # Why a file could not be sent.
        error = error.__cause__
    said = without_query(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = without_query(error.server_message or error)
        if status in (401, 403, 404):
            return OutputError(
                f"{SCHEME}{name}: the Hub refuses: {said}. If it is for the token, make one with the role 'write' for "
                f"{name.partition('/')[0]} at {hub}/settings/tokens, and give it with --hf_access_token or HF_TOKEN."
            )
        if status == 412:
            return OutputError(
                f"{SCHEME}{name}: somebody else has changed the repository during the upload. Run the same command "
                "again: it goes on."
            )
    return StorageError(f"{SCHEME}{name}: {hub} cannot be written to: {said}. Run the same command again: it goes on.")
