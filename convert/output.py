"""The output of a conversion: where it lies, and whose it is.

    <output>/0/items/                  the finished checkpoint (`orbax_checkpoint.py`)
    <output>/slicecast-run             by which plan an unfinished one is written, and by whom; gone when it is finished
    <output>/slicecast-log/            what each process did, wave by wave (`run_log.py`)
    <output>/slicecast-summary.json    what the finished checkpoint is, and how it came about (`summary.py`)
    <output>/slicecast-verification.json    what `verify` found in it (`verification/record.py`)
    <output>/slicecast-report.html     a page on it for people (`report/files.py`)

`slicecast-run` keeps two runs from writing into each other's checkpoint. It is created for one plan, and a run with
another plan is refused while it is there. A run with the same plan takes it over, since after a preemption nobody can
tell whether the old run is dead. The old run, if it lives, sees that before its next write, and stops. What it wrote
until then is right: chunks depend on the plan alone.
"""

import json
import os
import platform
import secrets
import threading
import time
from dataclasses import asdict, dataclass

from etils import epath

from slicecast.convert import orbax_checkpoint
from slicecast.convert.chunk_store import files, foreign_databases, remove_tree
from slicecast.convert.errors import OutputError, UsageError, first_line
from slicecast.convert.source.storage import check_package

LOG_DIRECTORY = "slicecast-log"
SUMMARY_FILE = "slicecast-summary.json"
VERIFICATION_FILE = "slicecast-verification.json"
REPORT_FILE = "slicecast-report.html"
_RUN_FILE = "slicecast-run"

# How long a run believes that the output is still its own. Until then two runs do the same work twice, no more.
_SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Run:
    """Who writes an output.

    Attributes:
        digest: The digest of source, plan and format.
        name: A name of the run that no other has.
        host: The machine of its process 0.
        started: When it began, as seconds since 1970.
    """

    digest: str
    name: str
    host: str
    started: float


def open_output(path: str) -> epath.Path:
    """The directory, or the path in a bucket, that a flag names.

    Raises:
        UsageError: If nothing can be written there, or a package that this takes is not installed.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return epath.Path(os.path.abspath(path))
    if scheme == "gs":
        check_package(path)
        return epath.Path(path.rstrip("/"))
    raise UsageError(f"{path}: '{scheme}://' cannot be written. Give a directory, gs://bucket/path or hf://org/name.")


def begin(output: epath.Path, digest: str, *, overwrite: bool, ocdbt: bool) -> str:
    """Makes the output this run's, and returns the run's name; "" if a finished checkpoint of this plan is there.

    Args:
        output: The output.
        digest: The digest of source, plan and format.
        overwrite: Whether what is there may be removed.
        ocdbt: Whether the checkpoint's chunks lie in databases.

    Raises:
        OutputError: If another checkpoint is there, or storage fails.
    """
    try:
        finished = orbax_checkpoint.finished_checkpoint(output)
        if finished is not None and orbax_checkpoint.read_own_metadata(finished).get("digest") == digest:
            return ""
        if finished is not None and not overwrite:
            raise OutputError(
                f"{finished}: there is a finished checkpoint of another source, or with other flags. Give another "
                "--base_output_directory, or --overwrite."
            )
        if overwrite:
            return _take(output, digest, _cleared(output, digest, ocdbt=ocdbt))
        unfinished = orbax_checkpoint.unfinished_checkpoint(output)
        if unfinished is not None and orbax_checkpoint.has_data(unfinished) and _read(output)[0] is None:
            raise OutputError(f"{unfinished}: an unfinished checkpoint that slicecast did not begin. Remove it.")
        output.mkdir(parents=True, exist_ok=True)
        return _take(output, digest, None)
    except OutputError:
        raise
    except Exception as error:  # Each backend of epath, and TensorStore, has errors of its own.
        cause = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{output}: cannot be written ({cause}). Give another directory.") from error


def _cleared(output: epath.Path, digest: str, *, ocdbt: bool) -> bytes | None:
    """Removes what is there, unless it is an unfinished checkpoint of this plan that can be finished.

    Returns:
        The generation of the file that says so; None if nothing was to be removed.
    """
    present, _ = _read(output)
    if present is not None and present.digest == digest and not _is_mixed(output, digest):
        return None
    output.mkdir(parents=True, exist_ok=True)
    if present is not None and not ocdbt:
        # A file carries no mark of its plan, so a late write of that run could not be told from ours.
        raise OutputError(
            f"{output}: a run of another plan began here on {present.host}. Without OCDBT, --overwrite cannot tell "
            "whether it still writes. Make sure that it does not, and remove the directory yourself."
        )
    # A run that lives is stopped by this, and one that was killed leaves an output that is refused until it is cleared.
    clearing = _encode(Run("", _new_name(), platform.node(), time.time()))
    generation: bytes = files(output).write(_RUN_FILE, clearing).result().generation
    orbax_checkpoint.remove(output)
    remove_tree(output / LOG_DIRECTORY)
    # They tell of what was there.
    for file in (SUMMARY_FILE, VERIFICATION_FILE, REPORT_FILE):
        (output / file).unlink(missing_ok=True)
    return generation


def _is_mixed(output: epath.Path, digest: str) -> bool:
    """Whether a run of another plan, thought dead, has written into an unfinished checkpoint: it is never committed."""
    step = orbax_checkpoint.unfinished_checkpoint(output)
    return step is not None and any(foreign_databases(item, digest) for item in step.glob(f"{orbax_checkpoint.ITEM}*"))


def _take(output: epath.Path, digest: str, cleared: bytes | None) -> str:
    """Writes who we are, over what `_cleared` has written, or over nothing, or over a run with the same plan."""
    run = Run(digest, _new_name(), platform.node(), time.time())
    if cleared is not None and _wrote(output, run, cleared):
        return run.name
    while True:
        present, generation = _read(output)
        if present is not None and not present.digest:
            raise OutputError(
                f"{output / _RUN_FILE}: what is there is being overwritten, or a run was killed that did so. Give "
                "another --base_output_directory, or --overwrite."
            )
        if present is not None and present.digest != digest:
            raise OutputError(
                f"{output / _RUN_FILE}: an unfinished checkpoint of another source, with other flags, or of another "
                f"version of slicecast is there (begun as {present.digest[:12]}, this is {digest[:12]}). Run the "
                "command that began it, give another --base_output_directory, or --overwrite."
            )
        if _wrote(output, run, generation):
            return run.name


def _wrote(output: epath.Path, run: Run, generation: bytes) -> bool:
    """Writes who we are, unless somebody else has written since this generation; whether it was written."""
    return bool(files(output).write(_RUN_FILE, _encode(run), if_equal=generation).result().generation)


def _read(output: epath.Path) -> tuple[Run | None, bytes]:
    """The run that has the output, and the generation of the file that says so."""
    found = files(output).read(_RUN_FILE).result()
    if found.state != "value":
        return None, found.stamp.generation
    try:
        return Run(**json.loads(found.value)), found.stamp.generation
    except (ValueError, TypeError):
        return Run("", "", "", 0.0), found.stamp.generation


def _encode(run: Run) -> bytes:
    return json.dumps(asdict(run)).encode()


def _new_name() -> str:
    return secrets.token_hex(4)


class Ownership:
    """That the output is a run's own. Used from several threads."""

    def __init__(self, output: epath.Path, name: str):
        self._output = output
        self._name = name
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Looks whether the output is still the run's own, if it is time to.

        Raises:
            OutputError: If it is not.
        """
        with self._lock:
            if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
                return
            self._looked = time.monotonic()
        self.check_now()

    def check_now(self) -> None:
        """Looks whether the output is still the run's own.

        Raises:
            OutputError: If it is not.
        """
        present, _ = _read(self._output)
        if present is None:
            raise OutputError(f"{self._output}: another run has finished or removed this checkpoint; this one stops.")
        if present.name != self._name:
            when = time.strftime("%H:%M:%S", time.localtime(present.started))
            raise OutputError(
                f"{self._output}: another run, begun on {present.host} at {when}, has taken this output over; this "
                "one stops. Nothing is lost: the other one goes on with what this one wrote."
            )


def release(output: epath.Path) -> None:
    """Makes the output nobody's, once the checkpoint is finished."""
    files(output).write(_RUN_FILE, None).result()
