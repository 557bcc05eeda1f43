"""Conversions from and to the Hub, and from web servers, against a stand-in: redirects, faults, refusals."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hub import Hub
from huggingface_hub import constants

from slicecast.convert.errors import MissingFileError, ReadError
from slicecast.convert.source import http
from slicecast.convert.source.storage import open_storage

NAME = "org/tiny"
TOKEN = "hf_right"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a tiny model, of which `main` is the commit `aaaa`."""
    tiny_models.write(tmp_path / "hub" / NAME / "aaaa", "llama", seed=1)
    running = Hub(tmp_path / "hub")
    running.faults(branches={f"{NAME}@main": "aaaa"})
    yield running
    running.close()


def convert(hub: Hub, output: Path, *flags: str, source: str = NAME) -> subprocess.CompletedProcess[str]:
    return hub.run("convert", f"--hf_model_path={source}", f"--base_output_directory={output}", *flags)


def assert_right(hub: Hub, output: Path, *flags: str) -> None:
    """Compares the result with the local files, and with the Hub's."""
    for source in (hub.folder / NAME / "aaaa", NAME):
        done = hub.run("verify", output, f"--hf_model_path={source}", *flags)
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr


@pytest.mark.parametrize("source", [NAME, f"hf://{NAME}", f"hf://{NAME}@aaaa"])
def test_conversion(hub: Hub, tmp_path: Path, source: str) -> None:
    done = convert(hub, tmp_path / "out", source=source)
    assert done.returncode == 0, done.stderr
    assert_right(hub, tmp_path / "out")


def test_each_file_is_looked_up_once_and_read_by_ranges(hub: Hub, tmp_path: Path) -> None:
    assert convert(hub, tmp_path / "out").returncode == 0
    lookups = [path for method, path, _, _ in hub.log() if "/resolve/" in path]
    # Planning and converting each open the repository.
    assert max(map(lookups.count, lookups)) <= 2
    reads = [range_ for method, path, range_, _ in hub.log() if path.startswith("/cdn/")]
    assert reads
    assert all(reads)


def test_addresses_that_run_out(hub: Hub, tmp_path: Path) -> None:
    hub.faults(uses=2)
    assert convert(hub, tmp_path / "out").returncode == 0
    hub.faults(uses=1 << 30)
    assert_right(hub, tmp_path / "out")


@pytest.mark.parametrize("fault", ["busy", "limited", "reset", "slow"])
def test_faults_that_pass(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.faults(**{fault: 2})
    done = convert(hub, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "secret-" not in done.stderr
    assert done.stderr.count("trying again") == (fault != "slow")  # That one is answered in time.
    assert_right(hub, tmp_path / "out")


def test_too_few_bytes_are_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.faults(short=1 << 30)
    done = convert(hub, tmp_path / "out")
    assert done.returncode != 0
    assert "delivered another number of bytes" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret-" not in done.stderr + done.stdout


def test_a_branch_that_moves_does_not_mix_commits(hub: Hub, tmp_path: Path) -> None:
    """The result is of the commit at the start, and it is compared with that one."""
    assert convert(hub, tmp_path / "out").returncode == 0
    shutil.copytree(hub.folder / NAME / "aaaa", hub.folder / NAME / "bbbb")
    tiny_models.write(hub.folder / NAME / "bbbb", "llama", seed=2)
    hub.faults(branches={f"{NAME}@main": "bbbb"})
    assert_right(hub, tmp_path / "out")
    done = hub.run("verify", tmp_path / "out", f"--hf_model_path={NAME}", "--revision=bbbb")
    assert "leaves differ from the source" in done.stderr
    commits = {
        path.split("/")[5 if path.startswith("/cdn/") else 4] for _, path, _, _ in hub.log() if "/resolve/" in path
    }
    assert commits == {"aaaa", "bbbb"}


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    tiny_models.write(hub.folder / NAME / "bbbb", "llama", seed=2)
    assert convert(hub, tmp_path / "out", "--revision=bbbb").returncode == 0
    done = hub.run("verify", tmp_path / "out", f"--hf_model_path={hub.folder / NAME / 'bbbb'}")
    assert "all equal" in done.stdout
    done = convert(hub, tmp_path / "other", "--revision=v2")
    assert "there is no revision 'v2'" in done.stderr
    done = convert(hub, tmp_path / "other", "--revision=v2", source=str(hub.folder / NAME / "aaaa"))
    assert "is no repository of the Hugging Face Hub" in done.stderr


def test_gated_repositories(hub: Hub, tmp_path: Path) -> None:
    hub.faults(gated=NAME)
    done = convert(hub, tmp_path / "out")
    assert done.returncode != 0
    assert "is gated. Ask for access at" in done.stderr
    assert "Traceback" not in done.stderr
    assert "is gated" in hub.run("plan", f"--hf_model_path={NAME}", token="hf_wrong").stderr
    assert hub.run("plan", f"--hf_model_path={NAME}", token=TOKEN).returncode == 0
    done = convert(hub, tmp_path / "out", f"--hf_access_token={TOKEN}")
    assert done.returncode == 0
    assert TOKEN not in done.stderr + done.stdout
    assert TOKEN not in "".join(
        file.read_text(errors="ignore") for file in tmp_path.rglob("*") if file.name == "_METADATA"
    )
    # The token is for the Hub, and for no other host.
    assert {auth for _, path, _, auth in hub.log() if path.startswith("/cdn/")} == {""}


def test_repositories_that_are_not_there(hub: Hub, tmp_path: Path) -> None:
    done = convert(hub, tmp_path / "out", source="org/nothing")
    assert "no repository of this name" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_hubs_library_is_loaded_for_the_hub_alone(slicecast: Any, llama: Path, tmp_path: Path) -> None:
    """It takes a tenth of a second."""
    flags = ("convert", f"--hf_model_path={llama}", f"--base_output_directory={tmp_path / 'out'}")
    prelude = "import atexit, sys\natexit.register(lambda: print('huggingface_hub' in sys.modules))"
    assert slicecast.start(*flags, prelude=prelude).wait().stdout.splitlines()[-1] == "False"


# ---- Outages


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that this process waits between attempts, which takes no time."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(http, "_notice", http.OutageNotice())
    return waited


@pytest.fixture
def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_no_network(
    naps: list[float], nowhere: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once that it is tried again, for a minute, and then what to do."""
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(ReadError) as raised:
        open_storage(NAME)
    cause = "[Errno 111] Connection refused"
    assert str(raised.value) == (
        f"{NAME}: the Hub at {nowhere} cannot be reached ({cause}). Check the network; HTTPS_PROXY names a proxy, "
        "HF_ENDPOINT a mirror of the Hub. Or give the directory of a copy. Then run the same command again."
    )
    said = f"slicecast: 127.0.0.1 does not answer as it should ({cause}); trying again for about a minute\n"
    assert capsys.readouterr().err == said
    assert naps == [1, 2, 4, 8, 8, 8, 8, 8, 8]


def test_a_web_server_that_does_not_answer(naps: list[float], nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReadError, match=r"cannot be read \(\[Errno 111\] Connection refused\)\. Check the address"):
        open_storage(f"{nowhere}/files").names()
    said = capsys.readouterr().err
    assert said.count("trying again") == said.count("\n") == 1
    assert len(naps) == 9


def test_an_outage_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Failures of one outage are at most a timeout and a wait apart. Addresses lose what grants access."""
    times = (0.0, 68.0, 136.0, 255.0, 375.0, 443.0)
    clock = iter(times)
    notice = http.OutageNotice(clock=lambda: next(clock))
    told = []
    for _ in times:
        notice.note("host", OSError("no answer from https://host/file?signature=secret in time"))
        told.append(capsys.readouterr().err)
    line = "slicecast: host does not answer as it should (no answer from https://host/file in time); trying again for "
    assert told == [f"{line}about a minute\n", "", "", "", f"{line}about a minute\n", ""]


def test_ctrl_c_is_not_taken_for_an_outage(naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(http, "http_backoff", interrupted)
    with pytest.raises(KeyboardInterrupt):
        http.request("GET", "http://host/file", {})
    with pytest.raises(KeyboardInterrupt):
        http.until_answered(interrupted)()
    assert naps == []


def test_offline(naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not want the network to be asked does not wait for it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match=f"{NAME}: found no directory .* because HF_HUB_OFFLINE is set. Unset"):
        open_storage(NAME)
    assert naps == []


# ---- Web servers


@pytest.mark.parametrize("files", ["single", "index"])
def test_conversion_from_a_web_server(hub: Hub, tmp_path: Path, files: str) -> None:
    source = hub.folder / NAME / "aaaa"
    if files == "index":
        names = tiny_models.tensors(tiny_models.model("llama"), 1)
        (source / "model.safetensors").rename(source / "part.safetensors")
        index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    url = f"{hub.endpoint}/files/{NAME}/aaaa"
    done = convert(hub, tmp_path / "out", source=url)
    assert done.returncode == 0, done.stderr
    for path in (source, url):
        done = hub.run("verify", tmp_path / "out", f"--hf_model_path={path}")
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr


@pytest.mark.parametrize("fault", ["busy", "limited", "reset"])
def test_faults_of_a_web_server_that_pass(hub: Hub, fault: str) -> None:
    hub.faults(**{fault: 2})
    assert hub.run("plan", f"--hf_model_path={hub.endpoint}/files/{NAME}/aaaa").returncode == 0


def test_web_servers_without_a_checkpoint(hub: Hub) -> None:
    done = hub.run("plan", f"--hf_model_path={hub.endpoint}/files/nothing")
    assert "MissingFileError" in done.stderr
    assert "found none of config.json" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Outputs


def test_conversion_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    """The repository gets what an output directory would have; a second start finds it there."""
    source, staging = hub.folder / NAME / "aaaa", tmp_path / "staging"
    arguments = [
        "convert",
        f"--hf_model_path={source}",
        "--base_output_directory=hf://org/converted",
        f"--staging_directory={staging}",
    ]
    for line in ("waves written, 0 had been written before", "the checkpoint was finished before"):
        done = hub.run(*arguments, token="hf_write")
        assert done.returncode == 0, done.stderr
        assert line in done.stderr
        assert done.stdout == "hf://org/converted/0/items\n"
        assert "hf_write" not in done.stderr
        done = hub.run("verify", staging, f"--hf_model_path={source}")
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr
    for file in staging.rglob("*"):
        name = str(file.relative_to(staging))
        if file.is_file() and not name.startswith(("slicecast-log/", "slicecast-verification.json")):
            with urllib.request.urlopen(f"{hub.endpoint}/org/converted/resolve/main/{name}") as uploaded:
                assert uploaded.read() == file.read_bytes(), name


def test_a_token_that_may_not_write_is_refused_before_anything_is_converted(hub: Hub, tmp_path: Path) -> None:
    source, staging = hub.folder / NAME / "aaaa", tmp_path / "staging"
    done = hub.run(
        "convert",
        f"--hf_model_path={source}",
        "--base_output_directory=hf://org/converted",
        f"--staging_directory={staging}",
        "--hf_access_token=hf_right",
    )
    assert done.returncode == 1
    assert "make one with the role 'write'" in done.stderr
    assert "hf_right" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not staging.exists()
