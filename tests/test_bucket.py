"""Conversions from a bucket, against a stand-in on loopback that TensorStore and gcsfs speak to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

SERVER = Path(__file__).with_name("bucket_server.py")

UPLOAD = """
import sys
from etils import epath
from pathlib import Path
for file in Path(sys.argv[1]).iterdir():
    (epath.Path(sys.argv[2]) / file.name).write_bytes(file.read_bytes())
"""


class Buckets:
    """A running stand-in with an empty bucket."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, SERVER, "bucket"], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self._environment = {
            **os.environ,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": address,
            "NO_GCE_CHECK": "true",
            "JAX_PLATFORMS": "cpu",
        }

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs Python with these buckets."""
        return subprocess.run(
            [sys.executable, "-P", *map(str, arguments)],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def slicecast(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs slicecast with these buckets."""
        return self.python("-m", "slicecast.convert", *arguments)

    def upload(self, directory: Path, url: str) -> None:
        """Copies the files of a directory."""
        done = self.python("-c", UPLOAD, directory, url)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def buckets() -> Iterator[Buckets]:
    running = Buckets()
    yield running
    running.close()


def test_conversion_from_a_bucket(buckets: Buckets, tmp_path: Path) -> None:
    source, output = tiny_models.write(tmp_path / "source", "llama"), tmp_path / "output"
    buckets.upload(source, "gs://bucket/models/tiny")
    arguments = ["--hf_model_path=gs://bucket/models/tiny", f"--base_output_directory={output}"]
    done = buckets.slicecast("convert", *arguments)
    assert done.returncode == 0, done.stderr
    for path in (source, "gs://bucket/models/tiny"):
        done = buckets.slicecast("verify", output, f"--hf_model_path={path}")
        assert "all equal to the source, bit for bit" in done.stdout, done.stderr


@pytest.mark.parametrize("url", ["gs://bucket/nothing", "gs://other/models/tiny"])
def test_buckets_and_paths_that_are_not_there(buckets: Buckets, url: str) -> None:
    done = buckets.slicecast("plan", f"--hf_model_path={url}")
    assert done.returncode != 0
    assert url in done.stderr
    assert "Traceback" not in done.stderr
