"""Reads what lies beside a checkpoint, and writes the page."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from slicecast.convert import orbax_checkpoint
from slicecast.convert.chunk_store import files
from slicecast.convert.errors import OutputError, first_line
from slicecast.convert.output import LOG_DIRECTORY, REPORT_FILE, SUMMARY_FILE
from slicecast.convert.report import data, page
from slicecast.convert.run_log import LogReader
from slicecast.convert.verification import record


def write_report(output: epath.Path, file: str | None = None) -> str:
    """Writes the report on a conversion.

    Args:
        output: The output of the conversion, finished or not.
        file: Where the page goes; None for `slicecast-report.html` in the output.

    Returns:
        The path of the page.

    Raises:
        OutputError: If there is nothing to report on, or storage fails.
    """
    try:
        report = data.extract(find_evidence(output))
    except OutputError:
        raise
    except Exception as error:  # Each backend of epath has its own; and files that are not ours raise anything.
        raise OutputError(f"{output}: no report can be made of what is there: {first_line(error)}") from error
    if report is None:
        raise OutputError(
            f"{output}: there is neither {SUMMARY_FILE} nor a log in {LOG_DIRECTORY}. Give the "
            "--base_output_directory of a conversion."
        )
    target = output / REPORT_FILE if file is None else epath.Path(file if "://" in file else os.path.abspath(file))
    try:
        files(target.parent).write(target.name, page.render(report)).result()
    except Exception as error:
        raise OutputError(f"{target}: cannot be written: {first_line(error)}") from error
    return str(target)


def find_evidence(output: epath.Path) -> data.Evidence:
    """What there is to report on, at an output."""
    step = orbax_checkpoint.finished_checkpoint(output)
    return data.Evidence(
        output=str(output),
        finished=step is not None,
        events=tuple(filter(_is_event, LogReader(output / LOG_DIRECTORY).new_events())),
        summary=_summary(output) if step is not None else {},
        metadata=orbax_checkpoint.read_custom_metadata(step) if step is not None else {},
        verifications=record.read(output),
        looked=time.time(),
    )


def _is_event(found: Any) -> bool:
    return isinstance(found, Mapping) and {"event", "time", "run", "process"} <= found.keys()


def _summary(output: epath.Path) -> Mapping[str, Any]:
    try:
        found = json.loads((output / SUMMARY_FILE).read_text())
    except FileNotFoundError:
        return {}  # Killed between the commit and the summary: the log still knows.
    if not isinstance(found, dict):
        raise OutputError(f"{output / SUMMARY_FILE}: this is no summary of a conversion.")
    return found
