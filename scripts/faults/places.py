"""Where checkpoints come from and go to: directories, and stand-ins on loopback for buckets and for the Hub."""

import shutil
from pathlib import Path

from bucket_server import BucketServer
from hub import Hub

LOCAL, BUCKET, HUB = "local", "bucket", "hub"

_BUCKET = "bucket"
_REPOSITORY, _COMMIT = "org/tiny", "a" * 40

# Never reached in a round.
_MANY = 1 << 30


class Places:
    """The same source in all places, and room for outputs.

    Attributes:
        source: The source's directory.
        environment: What makes the program find the stand-ins.
    """

    def __init__(self, directory: Path, source: Path):
        """Starts the stand-ins, and copies the source to them."""
        self.source = source
        self._outputs = directory / "outputs"
        self._outputs.mkdir()
        self._bucket = BucketServer(_BUCKET)
        for file in source.iterdir():
            self._bucket.upload(_BUCKET, f"source/{file.name}", file.read_bytes())
        shutil.copytree(source, directory / "hub" / _REPOSITORY / _COMMIT)
        self._hub = Hub(directory / "hub")
        self._hub.faults(branches={f"{_REPOSITORY}@main": _COMMIT})
        self.environment = {
            **self._bucket.environment,
            "HF_ENDPOINT": self._hub.endpoint,
            "HF_HOME": str(directory / "home"),
        }

    def source_in(self, place: str) -> str:
        """What the program is told to read."""
        return {LOCAL: str(self.source), BUCKET: f"gs://{_BUCKET}/source", HUB: _REPOSITORY}[place]

    def output_in(self, place: str, name: str) -> str:
        """What the program is told to write."""
        return f"gs://{_BUCKET}/outputs/{name}" if place == BUCKET else str(self._outputs / name)

    def remove_output(self, place: str, name: str) -> None:
        """Removes an output."""
        if place == BUCKET:
            self._bucket.remove(_BUCKET, f"outputs/{name}/")
        else:
            shutil.rmtree(self._outputs / name, ignore_errors=True)

    def fail(self, place: str, kind: str, times: int) -> None:
        """Makes the next requests to a stand-in fail."""
        if place == BUCKET:
            self._bucket.faults(**{kind: times})
        else:
            self._hub.faults(**{kind: times})

    def mend(self) -> None:
        """Ends all faults."""
        self._bucket.faults()
        self._hub.faults(busy=0, limited=0, reset=0, slow=0, short=0, uses=_MANY)

    def close(self) -> None:
        """Ends the stand-ins."""
        self._bucket.close()
        self._hub.close()
