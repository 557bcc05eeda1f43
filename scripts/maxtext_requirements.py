"""Prints what a MaxText wheel needs to build, load and run a model on a CPU, as pip requirements.

    python maxtext_requirements.py maxtext-*.whl > requirements.txt

MaxText has no dependencies of its own: everything is listed under extras, and its `tpu` extra holds over 200 lines,
among them accelerator runtimes, TensorFlow, linters and cloud clients. This script keeps the lines of the `tpu` extra
that loading a checkpoint and a forward pass import, and leaves out the ones named in `LEFT_OUT`.
"""

import re
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

EXTRA = "tpu"

LEFT_OUT = (
    # Runtimes of other hardware, and frameworks that only eager loading or other trainers use.
    *("libtpu", "nvidia-*", "pynvml", "torch*", "tensorflow*", "keras", "vllm*"),
    # Tools of MaxText's developers.
    *("auditwheel", "black", "isort", "pre-commit", "pyink", "pylint", "pytype", "importlab", "libcst"),
    # Clients and metrics of cloud services, and of evaluations.
    *("cheroot", "evaluate", "google-cloud-aiplatform", "google-cloud-mldiagnostics", "ml-goodput*"),
    *("latex*", "math-verify"),
)


def requirements(metadata: str) -> Iterator[str]:
    """Yields the wanted requirement lines.

    Args:
      metadata: the text of the wheel's METADATA file.

    Yields:
      Requirement specifiers. A marker other than `extra == 'tpu'` (platform, implementation) is kept.
    """
    in_extra = re.compile(rf"(?:\s+and\s+)?extra\s*==\s*['\"]{EXTRA}['\"]")
    for line in Parser().parsestr(metadata).get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()
        if not in_extra.search(marker) or any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            continue
        rest = in_extra.sub("", marker).strip()
        yield f"{requirement.strip()} ; {rest}" if rest else requirement.strip()


def main(arguments: list[str]) -> None:
    """Prints the requirements of the wheel given as the only argument."""
    if len(arguments) != 1 or not (wheel := Path(arguments[0])).is_file():
        sys.exit("usage: maxtext_requirements.py WHEEL (get one with `pip download --no-deps maxtext==VERSION`)")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        print("\n".join(sorted(requirements(archive.read(member).decode()))))


if __name__ == "__main__":
    main(sys.argv[1:])
