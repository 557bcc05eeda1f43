"""Conversions from S3, against moto on loopback."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from s3_server import SECRET_KEY, SESSION_TOKEN, S3Server

from slicecast.convert.errors import MissingFileError, ReadError, UsageError
from slicecast.convert.source.storage import ByteRange, Storage, open_storage

SOURCE = "s3://bucket/models/tiny"

CONTENT = b"abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a local directory."""
    return tiny_models.write(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def running(tiny: Path) -> Iterator[S3Server]:
    """A stand-in that has the model twice; who has no credentials sees it at `s3://bucket/public` only."""
    server = S3Server("bucket")
    server.upload(tiny, SOURCE.removeprefix("s3://"))
    server.upload(tiny, "bucket/public", public=True)
    yield server
    server.close()


@pytest.fixture
def s3(running: S3Server) -> S3Server:
    """The stand-in without faults."""
    running.faults()
    return running


def run(
    slicecast: Any, environment: Mapping[str, str], *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with no other variables of AWS. It never shows a secret."""
    prelude = (
        "import os\n[os.environ.pop(name) for name in list(os.environ) if name.startswith('AWS_')]\n"
        f"os.environ.update({environment!r})"
    )
    done: subprocess.CompletedProcess[str] = slicecast.run(*arguments, check=check, prelude=prelude)
    assert SECRET_KEY not in done.stdout + done.stderr
    assert SESSION_TOKEN not in done.stdout + done.stderr
    return done


def without_credentials(s3: S3Server) -> dict[str, str]:
    secrets = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    return {name: value for name, value in s3.environment.items() if name not in secrets}


def test_conversion(slicecast: Any, s3: S3Server, tiny: Path, tmp_path: Path) -> None:
    before = len(s3.log())
    assert "source       " in run(slicecast, s3.environment, "plan", f"--hf_model_path={SOURCE}").stdout
    run(slicecast, s3.environment, "convert", f"--hf_model_path={SOURCE}", f"--base_output_directory={tmp_path}/out")
    log = s3.log()[before:]
    for source in (SOURCE, str(tiny)):
        done = run(slicecast, s3.environment, "verify", f"{tmp_path}/out", f"--hf_model_path={source}")
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr
    assert all("/eu-north-1/s3/aws4_request" in signature for _, _, _, signature in log)
    weights = [(method, byte_range) for method, path, byte_range, _ in log if path.endswith(".safetensors")]
    assert {method for method, _ in weights} == {"GET"}
    assert all(byte_range for _, byte_range in weights)


def test_a_public_bucket(slicecast: Any, s3: S3Server) -> None:
    before = len(s3.log())
    run(slicecast, without_credentials(s3) | {"FSSPEC_S3_ANON": "true"}, "plan", "--hf_model_path=s3://bucket/public")
    assert {signature for _, _, _, signature in s3.log()[before:]} == {""}


def assert_refused(done: subprocess.CompletedProcess[str], error: str, code: int) -> None:
    assert done.returncode == code
    assert done.stderr.startswith(f"slicecast: {error}")
    assert done.stderr.count("\n") == 1


def test_a_path_that_is_not_there(slicecast: Any, s3: S3Server) -> None:
    url = "s3://bucket/models/tony"
    done = run(slicecast, s3.environment, "plan", f"--hf_model_path={url}", check=False)
    assert_refused(done, f"MissingFileError: {url}: found nothing", 1)


def test_no_credentials(slicecast: Any, s3: S3Server) -> None:
    done = run(slicecast, without_credentials(s3), "plan", f"--hf_model_path={SOURCE}", check=False)
    assert_refused(done, f"ReadError: {SOURCE}: cannot be listed (Unable to locate credentials)", 42)


def test_credentials_that_have_expired(slicecast: Any, s3: S3Server) -> None:
    """S3 repeats the token."""
    s3.faults(expired=100, only="config.json")
    done = run(slicecast, s3.environment, "plan", f"--hf_model_path={SOURCE}", check=False)
    assert_refused(done, "PlanErrors: [ReadError] config.json: bytes [0, ", 42)
    assert "ExpiredToken: The provided token has expired. Check" in done.stderr


@pytest.fixture
def storage(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    """A path of one small file. Each has another name, because s3fs keeps what it has listed."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.put(f"bucket/{tmp_path.name}/file", CONTENT)
    return open_storage(f"s3://bucket/{tmp_path.name}")


def read(storage: Storage, offset: int, nbytes: int) -> bytes:
    target = bytearray(nbytes)
    storage.read(ByteRange("file", offset, nbytes), [memoryview(target)])
    return bytes(target)


def test_names_sizes_and_ranges(storage: Storage) -> None:
    assert storage.names() == {"file"}
    assert storage.size("file") == len(CONTENT)
    assert read(storage, 3, 5) == CONTENT[3:8]
    with pytest.raises(MissingFileError, match="other: found no such file"):
        storage.size("other")
    with pytest.raises(ReadError, match=r"file: bytes \[10, 30\): found 0 bytes, expected 20: .* total size 26"):
        read(storage, 10, 20)


def test_answers_that_make_it_wait(s3: S3Server, storage: Storage) -> None:
    s3.faults(busy=1, reset=1)
    assert storage.names() == {"file"}
    assert s3.faults_left() == {"busy": 0, "reset": 0}
    s3.faults(busy=1, reset=1, short=1)
    with ThreadPoolExecutor(3) as pool:  # Each meets one of them.
        assert list(pool.map(lambda offset: read(storage, offset, 5), (0, 5, 10))) == [b"abcde", b"fghij", b"klmno"]
    assert s3.faults_left() == {"busy": 0, "reset": 0, "short": 0}


def test_an_object_that_is_replaced(s3: S3Server, storage: Storage) -> None:
    assert read(storage, 0, 4) == CONTENT[:4]
    s3.put(f"{storage.path.removeprefix('s3://')}/file", CONTENT.upper())
    with pytest.raises(ReadError, match="file: the file has been replaced"):
        read(storage, 4, 4)


def test_access_that_is_denied(s3: S3Server, storage: Storage) -> None:
    s3.faults(forbidden=100)
    with pytest.raises(ReadError, match=rf"{storage.path}: cannot be listed \(Access Denied\)"):
        storage.names()
    with pytest.raises(ReadError, match=r"file: .* PERMISSION_DENIED: AccessDenied: Access Denied\. Check"):
        read(storage, 0, 4)


def test_buckets_that_are_not_there(storage: Storage) -> None:
    with pytest.raises(MissingFileError, match="s3://basket/models: found nothing"):
        open_storage("s3://basket/models").names()
    with pytest.raises(UsageError, match='s3://Bucket!/models: found Invalid S3 bucket name: "Bucket!"'):
        open_storage("s3://Bucket!/models")
