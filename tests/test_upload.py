"""Output to the Hub, against a stand-in on loopback that stores as Git LFS does: whole, resumed, faulty, refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, HfApi, constants

from slicecast.convert import upload
from slicecast.convert.errors import OutputError, UsageError
from slicecast.convert.upload import HubOutput, UploadProgress, open_hub_output

NAME = "org/converted"
TOKEN = "hf_write"  # The one that the stand-in lets write.
INDEX = {"0/_CHECKPOINT_METADATA", "0/items/_METADATA"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, which this process takes for the real one; waiting for it takes no time."""
    (tmp_path / "hub").mkdir()
    running = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # Where hf_xet writes its log.
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield running
    running.close()


def tree(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {f"leaf{i}": generator.integers(0, 99, (50, 20 + i), dtype=np.int32) for i in range(5)}


def write(directory: Path, seed: int = 0, *, ocdbt: bool = True) -> HubOutput:
    """A finished checkpoint as Orbax writes it, the other files of an output beside it."""
    handler = ocp.CompositeCheckpointHandler(items=ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt))
    ocp.Checkpointer(handler).save(
        directory / "0",
        args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree(seed))),
        custom_metadata={"slicecast": {"digest": f"digest-{seed}"}},
    )
    (directory / "slicecast-summary.json").write_text("{}")
    (directory / "slicecast-log").mkdir()
    (directory / "slicecast-log" / "run-0-0.jsonl").write_text("{}")
    return open_hub_output(f"hf://{NAME}", str(directory))


def run(output: HubOutput, seed: int = 0, *, overwrite: bool = False) -> list[UploadProgress]:
    """Begins and uploads; what was reported."""
    reports: list[UploadProgress] = []
    if not output.begin(f"digest-{seed}", files=10, overwrite=overwrite):
        output.upload(reports.append, overwrite=overwrite)
    return reports


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def uploaded(output: HubOutput) -> dict[str, bytes]:
    """What should be in the repository, beside what the Hub makes itself."""
    return {path: data for path, data in contents(output.staging).items() if not path.startswith("slicecast-log")}


def assert_whole(hub: Hub, output: HubOutput, **others: str) -> None:
    found = contents(hub.history(NAME)[-1])
    assert ".gitattributes" in found
    del found[".gitattributes"]
    assert found == uploaded(output) | {path: text.encode() for path, text in others.items()}


def sent(hub: Hub) -> list[str]:
    """The hashes of the files whose content was sent, or was to be."""
    return [path.rpartition("/")[2] for method, path, _, _ in hub.log() if method == "PUT"]


def load(commit: Path) -> dict[str, np.ndarray]:
    restored: dict[str, np.ndarray] = ocp.PyTreeCheckpointer().restore(commit / "0" / "items")
    return restored


@pytest.mark.parametrize("ocdbt", [True, False])
def test_upload(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ocdbt: bool
) -> None:
    output = write(tmp_path / "out", ocdbt=ocdbt)
    monkeypatch.setattr(upload, "_MAX_FILES_OF_COMMIT", 2)
    capfd.readouterr()
    reports = run(output)
    assert_whole(hub, output)
    assert capfd.readouterr() == ("", "")
    # In parts, of which none but the last is a checkpoint.
    *parts, last = hub.history(NAME)
    assert len(parts) > 1
    assert not any(INDEX & contents(part).keys() for part in parts)
    for part in parts:
        with pytest.raises((FileNotFoundError, ValueError)):
            load(part)
    assert set(load(last)) == set(tree(0))
    assert all(np.array_equal(load(last)[leaf], value) for leaf, value in tree(0).items())
    # The repository is private, and storage is not told the token.
    assert [json.loads(body)["visibility"] for _, path, body, _ in hub.log() if path == "/api/repos/create"] == [
        "private"
    ]
    assert {token for method, _, _, token in hub.log() if method == "PUT"} == {""}
    assert (reports[0].files, reports[0].sent_bytes) == (0, 0)
    assert reports[-1].nbytes == reports[-1].sent_bytes == reports[-1].total_bytes
    assert reports[-1].files == reports[-1].total_files
    assert "upload 0.00 of 0.00 GB" in str(reports[-1])


def interrupted_after(files: int) -> Callable[[UploadProgress], None]:
    """A report that interrupts an upload when it has more than so many files."""

    def report(progress: UploadProgress) -> None:
        if progress.files > files:
            raise KeyboardInterrupt

    return report


def test_upload_through_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of hf_xet is a folder here. What is in it is its business; what Git is told is checked."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(upload, "_MAX_FILES_OF_COMMIT", 3)
    output = write(tmp_path / "out", ocdbt=False)
    assert not output.begin("digest-0", files=10, overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        output.upload(interrupted_after(3), overwrite=False)
    reports = run(output)
    assert 0 < reports[0].nbytes < reports[0].total_bytes == reports[-1].nbytes
    found, pointers = contents(hub.history(NAME)[-1]), 0
    for path, data in uploaded(output).items():
        if found[path] != data:
            digest = hashlib.sha256(data).hexdigest()
            wanted = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n"
            assert found[path].decode() == wanted
            pointers += 1
    assert pointers == len(tree(0))
    assert (hub.folder / ".xet").exists()
    assert not sent(hub)
    logs = list((tmp_path / "home" / "xet" / "logs").iterdir())
    assert logs
    assert not any(TOKEN in log.read_text() for log in logs)


def test_interrupted_upload_goes_on(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out", ocdbt=False)
    monkeypatch.setattr(upload, "_MAX_FILES_OF_COMMIT", 3)
    assert not output.begin("digest-0", files=10, overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        output.upload(interrupted_after(3), overwrite=False)
    assert len(hub.history(NAME)) == 2
    reports = run(output)
    assert 3 <= reports[0].files < reports[0].total_files
    assert reports[-1].sent_bytes < reports[-1].nbytes == reports[-1].total_bytes
    assert_whole(hub, output)
    assert len(sent(hub)) == len(set(sent(hub)))
    # Once more there is nothing to do.
    before = len(hub.history(NAME))
    assert run(output) == []
    assert len(hub.history(NAME)) == before


def test_killed_upload_goes_on(hub: Hub, tmp_path: Path) -> None:
    output = write(tmp_path / "out", ocdbt=False)
    program = (
        "import sys; from slicecast.convert import upload; upload._MAX_FILES_OF_COMMIT = 1;"
        f"output = upload.open_hub_output('hf://{NAME}', sys.argv[1]);"
        "output.begin('digest-0', files=10, overwrite=False); output.upload(print, overwrite=False)"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-P", "-c", program, str(output.staging)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for _ in range(3):
        assert running.stdout.readline().startswith("upload ")
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    running.stdout.close()
    stored = {file.name for file in (hub.folder / ".lfs").iterdir()}
    before = len(sent(hub))
    assert not INDEX & contents(hub.history(NAME)[-1]).keys()
    run(output)
    assert_whole(hub, output)
    again = set(sent(hub)[before:])
    assert again
    assert not again & stored


@pytest.mark.parametrize("ocdbt", [True, False])
def test_another_checkpoint_is_replaced_only_if_wanted(hub: Hub, tmp_path: Path, ocdbt: bool) -> None:
    run(write(tmp_path / "first", 0, ocdbt=ocdbt))
    license_ = CommitOperationAdd("LICENSE", b"Free.")
    HfApi().create_commit(NAME, [license_], commit_message="License")
    output = write(tmp_path / "second", 1, ocdbt=ocdbt)
    for action in (
        lambda: output.begin("digest-1", files=10, overwrite=False),
        lambda: output.upload(print, overwrite=False),
    ):
        with pytest.raises(OutputError, match=r"hf://org/converted: there is a finished checkpoint .* or --overwrite"):
            action()
    before = len(hub.history(NAME))
    run(output, 1, overwrite=True)
    # The old one is withdrawn before anything of the new one comes.
    for part in hub.history(NAME)[before:-1]:
        assert not INDEX & contents(part).keys()
    assert_whole(hub, output, LICENSE="Free.")
    # A checkpoint that was made elsewhere is recognized too.
    assert write(tmp_path / "third", 1).begin("digest-1", files=10, overwrite=False)


@pytest.mark.parametrize("fault", ["busy", "limited", "reset"])
@pytest.mark.parametrize("only", ["auth-check", "create", "preupload", "objects/batch", "large", "commit", "resolve"])
def test_faults_that_pass(hub: Hub, tmp_path: Path, fault: str, only: str) -> None:
    output = write(tmp_path / "out", ocdbt=False)
    hub.faults(**{fault: 2, "only": f"/{only}"})
    run(output)
    assert_whole(hub, output)
    assert output.begin("digest-0", files=10, overwrite=False)
    assert sum(f"/{only}" in path for _, path, _, _ in hub.log()) >= 3


def test_answers_to_commits_that_are_lost(hub: Hub, tmp_path: Path) -> None:
    hub.faults(lost=2)
    output = write(tmp_path / "first")
    run(output)
    assert_whole(hub, output)
    output = write(tmp_path / "second", 1)
    before = len(hub.history(NAME))
    hub.faults(lost=99)
    run(output, 1, overwrite=True)
    assert_whole(hub, output)
    # Withdrawing, data, checkpoint: each was done once, and seen to be done when it was tried again.
    assert len(hub.history(NAME)) == before + 3


def refusal(action: Callable[[], object]) -> str:
    """The message of the error that an action gives; it tells nobody the token, or a signature."""
    with pytest.raises(OutputError) as caught:
        action()
    for secret in (TOKEN, "hf_read", "secret-"):
        assert secret not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(("token", "said"), [("hf_read", "This token is for reading only."), ("", "Who are you?")])
def test_tokens_that_may_not_write(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, token: str, said: str
) -> None:
    output = write(tmp_path / "out")
    if exists:
        output.begin("digest-0", files=10, overwrite=False)
    monkeypatch.setenv("HF_TOKEN", token)
    message = refusal(lambda: output.begin("digest-0", files=10, overwrite=False))
    assert said in message
    assert f"make one with the role 'write' for org at {hub.endpoint}/settings/tokens" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    output.begin("digest-0", files=10, overwrite=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert said in refusal(lambda: output.upload(print, overwrite=False))
    assert hub.history(NAME) == []


def test_gated_repositories(hub: Hub, tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    output.begin("digest-0", files=10, overwrite=False)
    hub.faults(gated=NAME)
    assert "is gated. Ask for access at" in refusal(lambda: output.begin("digest-0", files=10, overwrite=False))


def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = write(tmp_path / "out")
    output.begin("digest-0", files=10, overwrite=False)
    hub.faults(busy=10_000, only="/large/")
    capfd.readouterr()
    message = refusal(lambda: output.upload(lambda _: None, overwrite=False))
    assert "503" in message
    assert "Run the same command again: it goes on." in message
    assert capfd.readouterr() == ("", "")
    hub.close()
    assert "cannot be written to" in refusal(lambda: output.upload(print, overwrite=False))


def test_a_repository_that_somebody_else_changes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out")
    require = HubOutput._require

    def interfere(*_: object) -> None:
        monkeypatch.setattr(HubOutput, "_require", require)
        HfApi().create_commit(NAME, [CommitOperationAdd("other", b"1")], commit_message="other")

    monkeypatch.setattr(HubOutput, "_require", interfere)
    assert "somebody else has changed the repository" in refusal(lambda: run(output))
    assert not INDEX & contents(hub.history(NAME)[-1]).keys()
    run(output)
    assert_whole(hub, output, other="1")


@pytest.mark.parametrize("large", [True, False])
def test_data_that_somebody_else_changes(hub: Hub, tmp_path: Path, large: bool) -> None:
    output = write(tmp_path / "out", ocdbt=False)
    path = "0/items/leaf0/0.0" if large else "0/items/leaf0/.zarray"
    changed = bytes(reversed((output.staging / path).read_bytes()))

    def interfere(progress: UploadProgress) -> None:
        if progress.files == progress.total_files:
            HfApi().create_commit(NAME, [CommitOperationAdd(path, changed)], commit_message="other")

    assert not output.begin("digest-0", files=10, overwrite=False)
    message = refusal(lambda: output.upload(interfere, overwrite=False))
    assert f"1 files were uploaded but are not there, or with another content, among them ['{path}']" in message
    assert not INDEX & contents(hub.history(NAME)[-1]).keys()
    run(output)
    assert_whole(hub, output)


@pytest.mark.parametrize("ignored", ["0/items/d/", "_METADATA"])
def test_files_that_the_repository_ignores(hub: Hub, tmp_path: Path, ignored: str) -> None:
    hub.faults(ignored=ignored)
    assert "that the repository has no .gitignore" in refusal(lambda: run(write(tmp_path / "out")))


def test_too_many_files(hub: Hub, tmp_path: Path) -> None:
    output = open_hub_output(f"hf://{NAME}", str(tmp_path))
    message = refusal(lambda: output.begin("digest-0", files=100_001, overwrite=False))
    assert "would have 100001 files" in message
    assert hub.log() == []


def test_what_a_flag_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_hub_output("hf://org/name/") == HubOutput("org/name", tmp_path / "slicecast" / "org" / "name")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_hub_output("hf://org/name").staging == Path.home() / ".cache" / "slicecast" / "org" / "name"
    assert open_hub_output("hf://org/name", "x").staging == Path.cwd() / "x"
    for wrong in ("hf://name", "hf://org/name/folder", "hf://org/name@main", "hf://"):
        with pytest.raises(UsageError, match="names no repository"):
            open_hub_output(wrong)
