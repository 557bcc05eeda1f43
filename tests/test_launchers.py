"""The launchers: what they would run, checked against the programs that they call, and against slicecast itself."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from slicecast.configs import slices
from slicecast.convert import cli, interruption

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
GCLOUD = json.loads((ROOT / "tests" / "data" / "gcloud_flags.json").read_text())

# In an environment of its own: it pins versions of protobuf, tenacity and others that our dependencies exclude.
XPK = "xpk==1.16.0"
XPK_ENVIRONMENT = ROOT / ".venv-xpk"

# XPK's shell looks this often whether the program has ended, and passes a signal on no sooner.
XPK_POLL_SECONDS = 5

# The longest that a launcher may take here; a hang ends here.
TIMEOUT_SECONDS = 60.0

SLICE = ("--name=kimi", "--zone=us-west4-a")
NEW_SLICE = (*SLICE, "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite")
CLUSTER = ("--cluster=training", "--workload=kimi", "--tpu-type=v5litepod-16", "--zone=us-west4-a", "--project=models")
IMAGE = "us-docker.pkg.dev/models/images/slicecast:1"
CONVERT = ("convert", "--hf_model_path=gs://bucket/in", "--base_output_directory=gs://bucket/out")

# Words that a shell, ssh, YAML or Kubernetes could take for something else.
HARD_WORDS = (
    '--hf_model_path=/data/a model\'s "weights"',
    "--base_output_directory=gs://bucket/$HOME/$(reboot)/$(PROCESS_ID)/`reboot`",
    "--ignore_extra=^(vision|audio)\\..{0,2}$ # & ; > x",
    "--model_name=two  spaces and *",
    "--revision=line\nbreak: 'é'",
    "--maxtext_version=",
)


def launch(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / script), *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def commands(script: str, *words: str, **environment: str) -> list[list[str]]:
    """The commands that a dry run prints, as the shell reads them."""
    result = launch(script, "--dry-run", *words, **environment)
    assert result.returncode == 0, result.stderr
    printed = []
    for line in result.stdout.splitlines():
        if not line.startswith("#"):
            read = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
            printed.append(read.stdout.split("\0")[:-1])
    return printed


def flags(command: Sequence[str]) -> dict[str, str | None]:
    pairs = (word.partition("=") for word in command if word.startswith("--"))
    return {name: value if equals else None for name, equals, value in pairs}


# --- gcloud ---


@pytest.mark.parametrize(
    ("options", "subcommands"),
    [
        pytest.param((*NEW_SLICE, "--spot", "--delete"), ["create", "describe", "delete"], id="spot"),
        pytest.param((*NEW_SLICE, "--reserved", "--project=models", "--internal-ip"), ["create", "describe"], id="own"),
        pytest.param((*NEW_SLICE, "--create-flag=--network=n"), ["create", "describe"], id="on demand"),
        pytest.param(SLICE, ["describe"], id="existing"),
        pytest.param((*SLICE, "--delete", "--internal-ip"), ["describe", "delete"], id="existing, deleted"),
    ],
)  # fmt: skip
def test_gcloud_documents_every_flag(options: Sequence[str], subcommands: Sequence[str]) -> None:
    found = []
    for command in commands("launch_tpu_vm.sh", *options, "--", *CONVERT):
        if command[0] != "gcloud":
            continue
        documented = GCLOUD["commands"][" ".join(command[1:5])]
        everywhere = GCLOUD["every command"]
        for flag, value in flags(command).items():
            kind = "switches" if value is None else "flags"
            assert flag in documented[kind] + everywhere[kind], (command, flag)
        assert flags(command)["--zone"] == "us-west4-a"
        operands = [word for word in command[5:] if not word.startswith("--")]
        assert len(operands) == 1 or command[4] == "scp"
        found.append(command[4])
    hosts = ["ssh", "scp", "ssh", "ssh", "ssh"]
    assert found == [*subcommands[:-1], *hosts, "delete"] if "delete" in subcommands else [*subcommands, *hosts]


def test_a_new_slice_gets_what_was_asked_for() -> None:
    words = commands("launch_tpu_vm.sh", *NEW_SLICE, "--spot", "--create-flag=--network=n", "--", *CONVERT)
    created = next(command for command in words if command[4:5] == ["create"])
    assert created[5] == "kimi"
    assert flags(created) == {
        "--zone": "us-west4-a",
        "--node-id": "kimi",
        "--accelerator-type": "v5litepod-16",
        "--runtime-version": "v2-alpha-tpuv5-lite",
        "--spot": None,
        "--network": "n",
    }


def test_a_dry_run_needs_no_gcloud_and_no_xpk(tmp_path: Path) -> None:
    for program in ("bash", "sed", "dirname", "basename", "python3", "env"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    assert shutil.which("gcloud", path=str(tmp_path)) is None
    assert commands("launch_tpu_vm.sh", *NEW_SLICE, "--", *CONVERT, PATH=str(tmp_path))
    assert commands("launch_xpk.sh", *CLUSTER, "--", *CONVERT, PATH=str(tmp_path))


def test_words_survive_ssh(tmp_path: Path) -> None:
    starts = [
        flags(command)["--command"]
        for command in commands("launch_tpu_vm.sh", *SLICE, "--", "convert", *HARD_WORDS)
        if command[4:5] == ["ssh"] and "worker.sh start" in str(flags(command)["--command"])
    ]
    (tmp_path / ".slicecast").mkdir()
    (tmp_path / ".slicecast" / "tpu_vm_worker.sh").write_text("printf '%s\\0' \"$@\"")
    (command,) = starts
    run = subprocess.run(["bash", "-c", str(command)], cwd=tmp_path, capture_output=True, text=True, check=True)
    received = run.stdout.split("\0")[:-1]
    assert received == ["start", "convert", *HARD_WORDS]
    assert vars(cli.parse(received[1:])) == vars(cli.parse(["convert", *HARD_WORDS]))


# --- xpk ---


@pytest.fixture(scope="session")
def xpk() -> Path:
    """XPK's own environment, made on first use; half a minute."""
    stamp = XPK_ENVIRONMENT / "installed"
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "xpk.lock", "w") as lock:  # Test processes run side by side.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != XPK:
            venv.create(XPK_ENVIRONMENT, clear=True, with_pip=True)
            subprocess.run([XPK_ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet", XPK], check=True)
            stamp.write_text(XPK)
    return XPK_ENVIRONMENT


def xpk_command(*words: str) -> list[str]:
    (command,) = commands("launch_xpk.sh", *CLUSTER, f"--docker-image={IMAGE}", *words)
    return command


PARSE = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
print(json.dumps({key: value for key, value in vars(parser.parse_args()).items() if not callable(value)}))
"""


def parsed_by_xpk(xpk: Path, command: Sequence[str]) -> dict[str, Any]:
    assert command[0] == "xpk"
    python = str(xpk / "bin" / "python")
    result = subprocess.run([python, "-c", PARSE, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return parsed


def test_xpk_parses_the_command(xpk: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    parsed = parsed_by_xpk(xpk, xpk_command("--spot", "--priority=high", f"--env-file={environment}", "--", *CONVERT))
    expected = {
        "xpk_subcommands": "workload",
        "xpk_workload_subcommands": "create",
        "cluster": "training",
        "workload": "kimi",
        "tpu_type": "v5litepod-16",
        "num_slices": 1,
        "docker_image": IMAGE,
        "spot": True,
        "priority": "high",
        "env_file": str(environment),
        "max_restarts": "10",
        "command": f"exec slicecast {shlex.join(CONVERT)}",
    }
    assert {key: parsed[key] for key in expected} == expected
    assert parsed_by_xpk(xpk, xpk_command("--max-restarts=3", "--", *CONVERT))["max_restarts"] == "3"


def test_xpk_refuses_what_it_does_not_know(xpk: Path) -> None:
    """The parser is a check: a flag that XPK does not have does not pass."""
    with pytest.raises(AssertionError, match="unrecognized arguments: --no-such-flag"):
        parsed_by_xpk(xpk, xpk_command("--no-such-flag", "--", *CONVERT))


@pytest.fixture(scope="session")
def manifest(xpk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JobSet that XPK makes of the command."""
    home = tmp_path_factory.mktemp("home")
    (home / ".config" / "xpk").mkdir(parents=True)
    (home / ".config" / "xpk" / "config.yaml").write_text("version: v1\nconfigs:\n  send-telemetry: 'false'\n")
    command = xpk_command("--", "convert", *HARD_WORDS)
    offline = ["--dry-run", "--skip-validation", f"--output-manifest-file={home / 'jobset.yaml'}"]
    result = subprocess.run(
        [str(xpk / "bin" / "xpk"), *command[1:], *offline],
        env={**os.environ, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    made: dict[str, Any] = yaml.safe_load((home / "jobset.yaml").read_text())
    return made


def start_container(manifest: dict[str, Any], directory: Path, slicecast: str) -> subprocess.Popen[str]:
    """The container's command, with a program of ours as slicecast."""
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    # XPK looks every five seconds whether the program has ended.
    for name, program in (("slicecast", slicecast), ("sleep", "exec /bin/sleep 0.05")):
        (directory / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (directory / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "DIRECTORY": str(directory)}
    return subprocess.Popen(container["command"], env=environment, stdout=subprocess.PIPE, text=True, process_group=0)


def test_xpk_restarts_what_can_go_on(manifest: dict[str, Any]) -> None:
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 10
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == slices.parse("v5litepod-16").hosts
    # Time for slicecast to end, after XPK has passed SIGTERM on.
    grace_seconds = job["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_seconds >= XPK_POLL_SECONDS + interruption.GRACE_SECONDS
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    restarted = set(rule["onExitCodes"]["values"])
    assert {134, 137, 143} <= restarted
    assert not {0, 1, 2} & restarted


def test_words_survive_xpk(manifest: dict[str, Any], tmp_path: Path) -> None:
    process = start_container(manifest, tmp_path, 'printf "%s\\0" "$@" >"$DIRECTORY/arguments"; exit 143')
    process.communicate(timeout=TIMEOUT_SECONDS)
    received = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert received == ["convert", *HARD_WORDS]
    assert process.returncode == 143


def test_sigterm_goes_through_the_shell_of_xpk(manifest: dict[str, Any], tmp_path: Path) -> None:
    """As process 1 of the container, XPK's shell gets SIGTERM; it passes it on to slicecast itself."""
    ready = tmp_path / "ready"
    program = f"exec {sys.executable} -c 'import pathlib, signal, sys\nsignal.signal(15, lambda *_: sys.exit(143))\n"
    process = start_container(manifest, tmp_path, f'{program}pathlib.Path("{ready}").touch()\nsignal.pause()\'')
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143


# --- both ---


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("launch_tpu_vm.sh", [*SLICE], "slicecast's own command line is missing"),
        ("launch_tpu_vm.sh", [*SLICE, "--"], "slicecast's own command line is missing"),
        ("launch_tpu_vm.sh", ["--name=kimi", "--", *CONVERT], "--name and --zone are needed"),
        ("launch_tpu_vm.sh", [*SLICE, "--spot", "--", *CONVERT], "--spot needs --accelerator-type"),
        ("launch_tpu_vm.sh", [*NEW_SLICE, "--spot", "--reserved", "--", *CONVERT], "exclude each other"),
        ("launch_tpu_vm.sh", [*NEW_SLICE[:3], "--", *CONVERT], "--accelerator-type needs --runtime-version"),
        ("launch_tpu_vm.sh", [*SLICE, "--max-restarts=many", "--", *CONVERT], "is not a number"),
        ("launch_tpu_vm.sh", [*SLICE, "--hf-token-file=/no/such", "--", *CONVERT], "cannot be read"),
        ("launch_tpu_vm.sh", [*SLICE, "--hf_model_path=x"], "'--hf_model_path=x' is not understood"),
        ("launch_xpk.sh", ["--", *CONVERT], "--cluster, --workload, --tpu-type and an image are needed"),
        ("launch_xpk.sh", [*CLUSTER], "slicecast's own command line is missing"),
        ("launch_xpk.sh", [*CLUSTER, "--command=x", "--", *CONVERT], "the command is what comes after --"),
    ],
)
def test_a_wrong_command_line_is_refused(script: str, words: Sequence[str], message: str) -> None:
    result = launch(script, "--dry-run", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("spelling", ["--hf_access_token=hf_secret", "hf_access_token=hf_secret", "--hf_access_token"])
@pytest.mark.parametrize(("script", "options"), [("launch_tpu_vm.sh", SLICE), ("launch_xpk.sh", CLUSTER)])
def test_a_token_on_the_command_line_is_refused(script: str, options: Sequence[str], spelling: str) -> None:
    result = launch(script, "--dry-run", *options, "--", *CONVERT, spelling)
    assert result.returncode == 2
    assert "a token on the command line would be shown in logs" in result.stderr
    assert "hf_secret" not in result.stdout + result.stderr


def test_no_token_is_shown(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("hf_of_the_file")
    tokens = {"HF_TOKEN": "hf_of_the_environment", "HF_AUTH_TOKEN": "hf_of_the_other"}
    options = (*NEW_SLICE, f"--hf-token-file={token_file}")
    tpu_vm = launch("launch_tpu_vm.sh", "--dry-run", *options, "--", *CONVERT, **tokens)
    xpk = launch("launch_xpk.sh", "--dry-run", *CLUSTER, f"--env-file={token_file}", "--", *CONVERT, **tokens)
    assert f"scp {token_file} kimi:.slicecast/hf_token" in tpu_vm.stdout
    assert f"--env-file={token_file}" in xpk.stdout
    for result in (tpu_vm, xpk):
        assert result.returncode == 0
        assert "hf_of" not in result.stdout + result.stderr


@pytest.mark.parametrize("script", ["launch_tpu_vm.sh", "launch_xpk.sh"])
def test_help_says_what_there_is(script: str) -> None:
    result = launch(script, "--help")
    assert result.returncode == 0
    own = set(re.findall(r"^ {4}(--[a-z-]+)(?:=\*)?(?: \|.*)?\)", (SCRIPTS / script).read_text(), re.MULTILINE))
    assert own - {"--command"} <= set(re.findall(r"--[a-z-]+", result.stdout)) | {"--help"}


def test_the_scripts_are_clean() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [shellcheck, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS.glob("*.sh")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
