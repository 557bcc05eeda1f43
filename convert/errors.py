"""One exception per kind of failure.

Every message names the file, the tensor, what was found, what was expected, and what to do. The command line prints the
message without a stack trace and exits with the class's `exit_code`. Planning collects all its errors and raises them
together as `PlanErrors`, so that a user mends everything in one round.
"""

from collections.abc import Sequence

# The exit code of failures that may pass, such as that of a bucket. XPK, and our manifests, start a run again after it.
_TRY_AGAIN = 42


class SlicecastError(Exception):
    """Base of all errors that a user can meet. Anything else that escapes is a bug of ours."""

    exit_code = 1


class UsageError(SlicecastError):
    """A flag is unknown, misspelled, or contradicts another one."""

    exit_code = 2


class MissingFileError(SlicecastError):
    """A file that the checkpoint needs, or that its index names, is not there."""


class HeaderError(SlicecastError):
    """A safetensors header (or the index file) is not what the format says: length, JSON, or a field of it."""


class TruncatedFileError(SlicecastError):
    """A file is shorter, or longer, than its header promises."""


class OffsetError(SlicecastError):
    """Byte ranges of a header overlap, leave holes, lie outside the file, or disagree with shape and dtype."""


class DuplicateTensorError(SlicecastError):
    """The same tensor name occurs twice, in one file or in two."""


class ConfigError(SlicecastError):
    """`config.json` is missing a field, or holds a value that the family's rules do not understand."""


class UnsupportedArchitectureError(SlicecastError):
    """No family of rules covers the architecture that `config.json` names."""


class UnsupportedFormatError(SlicecastError):
    """A quantization format, or a stored dtype, that no codec covers."""


class MissingTensorError(SlicecastError):
    """The rules need a tensor that the checkpoint does not hold."""


class MissingPartnerError(SlicecastError):
    """A quantized tensor lacks its scale, or another of the tensors that give it its value."""


class UnusedTensorError(SlicecastError):
    """The checkpoint holds a tensor that no rule reads and no rule ignores."""


class ShapeError(SlicecastError):
    """A tensor's shape disagrees with `config.json`, or with the shapes of its partners."""


class TargetError(SlicecastError):
    """The target tree disagrees with MaxText's tree for the model that `--model_name` names."""


class BudgetError(SlicecastError):
    """A memory budget is below what the smallest unit of work needs."""


class OutputError(SlicecastError):
    """The output cannot be used: another checkpoint or run is there, hosts do not share it, or it is not writable."""


class StorageError(OutputError):
    """Storage failed while a checkpoint was written."""

    exit_code = _TRY_AGAIN


class ReadError(SlicecastError):
    """A byte range of a source file could not be read."""

    exit_code = _TRY_AGAIN


class StoppedError(SlicecastError):
    """The user interrupted the run."""

    exit_code = 130  # What shells use for a command ended by Ctrl-C.


class PreemptedError(StoppedError):
    """The machine is taken away, or a scheduler ends the run: SIGTERM."""

    exit_code = 143  # What shells use for a command ended by SIGTERM. XPK starts again after 127 to 255.


class IncompleteError(SlicecastError):
    """Chunks of the output are missing at the end of a run; the checkpoint was not committed."""


class VerificationError(SlicecastError):
    """The checkpoint's values, shapes or dtypes differ from what the source gives."""


def first_line(error: BaseException | str) -> str:
    """The first line of what an error of a library says; what it is, if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class PlanErrors(SlicecastError):  # noqa: N818  It holds several errors.
    """All errors that planning found, each on its own."""

    def __init__(self, errors: Sequence[SlicecastError]):
        self.errors = tuple(errors)
        if all(error.exit_code == _TRY_AGAIN for error in self.errors):
            self.exit_code = _TRY_AGAIN
        lines = [f"[{type(error).__name__}] {error}" for error in self.errors]
        super().__init__("\n".join(lines))
