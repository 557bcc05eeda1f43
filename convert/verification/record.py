"""What `verify` found, kept beside the checkpoint.

    <output>/slicecast-verification.json

Each verification is added to those before it, so that a sample does not hide an earlier full comparison.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from slicecast.convert.chunk_store import files
from slicecast.convert.output import VERIFICATION_FILE


@dataclass(frozen=True)
class Verification:
    """One comparison of a finished checkpoint.

    Attributes:
        strength: How much was compared: `full`, `sample` or `digests`.
        checkpoint: The digest in the checkpoint's own metadata, so that a result never passes for that of another one.
        version: The version of slicecast that compared.
        finished: When, as seconds since 1970.
        seconds: How long it took.
        hosts: How many hosts took part.
        leaves: How many leaves were compared.
        right: A line for each thing that was found right.
        wrong: Each leaf that differs, and how.
    """

    strength: str
    checkpoint: str
    version: str
    finished: float
    seconds: float
    hosts: int
    leaves: int
    right: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Verification":
        """The verification that `dataclasses.asdict` made a record of."""
        lists = {
            "right": tuple(map(str, record.get("right", ()))),
            "wrong": tuple((str(path), str(detail)) for path, detail in record.get("wrong", ())),
        }
        return cls(**{**record, **lists})


def add(output: epath.Path, verification: Verification) -> None:
    """Adds a verification to those of an output; called by one process."""
    known = [*read(output), verification]
    files(output).write(VERIFICATION_FILE, json.dumps([dataclasses.asdict(each) for each in known], indent=1)).result()


def read(output: epath.Path) -> tuple[Verification, ...]:
    """The verifications of an output, oldest first; none if the file is not there or is not ours."""
    try:
        return tuple(map(Verification.from_json, json.loads((output / VERIFICATION_FILE).read_text())))
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return ()
