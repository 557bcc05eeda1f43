"""A stand-in for `gcloud`: TPU slices are folders, their workers have a home folder each, and SSH is a shell in it.

It is put on the PATH under the names of the programs that it stands for. The environment variable FAKE_GCLOUD names the
folder that it keeps its state in:

    calls.jsonl     every command line, as a JSON array
    states          what `describe` answers, one a line; the last one stays
    after_create    what `states` becomes when a slice is created
    worker-N/       the home folder of worker N
    exits/N         the exit codes of slicecast on worker N, one a line for each start; "wait" waits for SIGTERM
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What the stand-in for uv installs as slicecast: it notes what it was given, and ends as it is told.
SLICECAST = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$HOME/arguments"
echo "token file: ${HF_TOKEN_PATH:-none}"
exits="$FAKE_GCLOUD/exits/${HOME##*-}"
code="$(head -n 1 "$exits")"
sed -i 1d "$exits"
if [[ "$code" == wait ]]; then
  trap 'exit 143' TERM
  while true; do /bin/sleep 0.05; done
fi
exit "$code"
"""

STATE = Path(os.environ["FAKE_GCLOUD"])


def workers() -> list[Path]:
    """The home folders of the slice."""
    return sorted(STATE.glob("worker-*"))


def describe() -> int:
    """Prints the state of the slice, and goes on to the next one."""
    first, *rest = (STATE / "states").read_text().split()
    if rest:
        (STATE / "states").write_text("\n".join(rest))
    if first == "ABSENT":
        print("ERROR: NOT_FOUND", file=sys.stderr)
        return 1
    print(first)
    return 0


def create() -> int:
    """Makes the slice, with new and empty workers."""
    for home in workers():
        shutil.rmtree(home)
        home.mkdir()
    shutil.copy(STATE / "after_create", STATE / "states")
    return 0


def delete() -> int:
    """Removes the slice."""
    (STATE / "states").write_text("ABSENT")
    return 0


def ssh(command: str) -> int:
    """Runs a command on all workers, as gcloud does: split at spaces, and joined again by ssh."""
    script = " ".join(command.split(" "))
    running = [
        subprocess.Popen(["bash", "-c", script], cwd=home, env={**os.environ, "HOME": str(home)}) for home in workers()
    ]
    return next((code for code in [process.wait() for process in running] if code), 0)


def scp(sources: Sequence[str], destination: str) -> int:
    """Copies files to all workers."""
    for home in workers():
        for source in sources:
            shutil.copy(source, home / destination.partition(":")[2])
    return 0


def gcloud(arguments: Sequence[str]) -> int:
    """Carries out a command."""
    with open(STATE / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(["gcloud", *arguments]) + "\n")
    verb, words = arguments[3], arguments[4:]
    flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    operands = [word for word in words if not word.startswith("--")]
    match verb:
        case "describe":
            return describe()
        case "create":
            return create()
        case "delete":
            return delete()
        case "ssh":
            return ssh(flags["--command"])
        case "scp":
            return scp(operands[:-1], operands[-1])
    raise ValueError(verb)


def uv(arguments: Sequence[str]) -> int:
    """Makes an environment, and installs the stand-in for slicecast, or the program that FAKE_SLICECAST names."""
    if arguments[0] == "venv":
        Path("venv/bin").mkdir(parents=True)
        Path("venv/bin/python").symlink_to(sys.executable)
        return 0
    assert Path(arguments[-1].removesuffix("[tpu]")).is_file(), arguments
    program = Path("venv/bin/slicecast")
    program.unlink(missing_ok=True)
    if real := os.environ.get("FAKE_SLICECAST"):
        program.symlink_to(real)
    else:
        program.write_text(SLICECAST)
        program.chmod(0o755)
    return 0


def python(arguments: Sequence[str]) -> int:
    """Builds an empty wheel in the place of `pip wheel`; runs other code."""
    if arguments[:3] != ["-m", "pip", "wheel"]:
        return subprocess.run([sys.executable, *arguments]).returncode
    folder = Path(arguments[arguments.index("--wheel-dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slicecast-0.1.0-py3-none-any.whl").touch()
    return 0


def sleep(_: Sequence[str]) -> int:
    """Waits for a moment, however long it should."""
    return subprocess.run(["/bin/sleep", "0.05"]).returncode


if __name__ == "__main__":
    sys.exit({"gcloud": gcloud, "uv": uv, "python": python, "sleep": sleep}[sys.argv[1]](sys.argv[2:]))
