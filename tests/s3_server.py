"""A stand-in for S3 on loopback, as a program: moto, with faults.

    python s3_server.py     prints its port, then serves, without a bucket at first, in memory

`GET /log` gives the requests so far. `PUT /faults` makes requests fail on purpose: it takes a JSON object that says how
many times each fault is to happen, and with `only`, a regular expression, to which requests. `GET /faults` says how
many times each is still to happen.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

# What a client has, and must not show.
SESSION_TOKEN = "FwoGZXIvYXdzEXAMPLETOKEN"
SECRET_KEY = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"

# Each fault's status line, and S3's words for it.
_REFUSALS = {
    "busy": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "forbidden": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
}

_FAULTS = (*_REFUSALS, "reset", "short")

# S3 repeats the token, and for other errors the key's name.
_BODY = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message>"
    f"<Token-0>{SESSION_TOKEN}</Token-0></Error>"
)

Environment = dict[str, Any]
Application = Callable[[Environment, Callable[..., Any]], Iterable[bytes]]


class Faults:
    """Lets moto answer, except where something is to go wrong."""

    def __init__(self, application: Application):
        self._application = application
        self._log: list[list[str]] = []
        self._faults: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, environment: Environment, start: Callable[..., Any]) -> Iterable[bytes]:
        """Serves one request."""
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        if path == "/log":
            return _answer(start, "200 OK", json.dumps(self._log))
        if path == "/faults":
            with self._lock:
                if method == "PUT":
                    self._faults = json.loads(environment["wsgi.input"].read(int(environment["CONTENT_LENGTH"])))
                return _answer(start, "200 OK", json.dumps(self._faults))
        fault = self._note(method, path, environment)
        if fault in _REFUSALS:
            status, code, message = _REFUSALS[fault]
            return _answer(start, status, _BODY.format(code=code, message=message))
        if fault == "reset":
            _hang_up(environment)
        answer = self._application(environment, start)
        return _cut(answer, environment) if fault == "short" else answer

    def _note(self, method: str, path: str, environment: Environment) -> str:
        """Notes a request, and says what is to go wrong with it, if something is."""
        byte_range = environment.get("HTTP_RANGE", "")
        with self._lock:
            self._log.append([method, path, byte_range, environment.get("HTTP_AUTHORIZATION", "")])
            if re.search(self._faults.get("only", ""), f"{method} {path} {byte_range}"):
                for fault in _FAULTS:
                    if self._faults.get(fault, 0) > 0:
                        self._faults[fault] -= 1
                        return fault
        return ""


def _answer(start: Callable[..., Any], status: str, body: str = "") -> list[bytes]:
    content = body.encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
    return [content]


def _cut(answer: Iterable[bytes], environment: Environment) -> Iterator[bytes]:
    """Less than what was announced."""
    yield b"".join(answer)[:-1]
    _hang_up(environment)


def _hang_up(environment: Environment) -> NoReturn:
    environment["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


class S3Server:
    """A running stand-in.

    Attributes:
        address: Its URL.
    """

    def __init__(self, *names: str):
        """A stand-in with these buckets, in a process of its own."""
        # Moto reads AWS' variables too.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        for name in names:
            self._ask("PUT", f"/{name}")

    @property
    def environment(self) -> dict[str, str]:
        """What makes TensorStore and s3fs use it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_DEFAULT_REGION": "eu-north-1",
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_SESSION_TOKEN": SESSION_TOKEN,
            # Nothing of the user, nor of the machine.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def faults(self, **faults: Any) -> None:
        """Makes it fail so many times, and forgets earlier faults; see the server."""
        self._ask("PUT", "/faults", json.dumps(faults).encode())

    def faults_left(self) -> dict[str, Any]:
        """How many times each is still to happen, and `only`."""
        found: dict[str, Any] = json.loads(self._ask("GET", "/faults"))
        return found

    def log(self) -> list[list[str]]:
        """Method, path, range, and signature of each request so far."""
        found: list[list[str]] = json.loads(self._ask("GET", "/log"))
        return found

    def upload(self, directory: Path, path: str, *, public: bool = False) -> None:
        """Copies the files of a directory; `path` begins with the bucket."""
        for file in directory.iterdir():
            self.put(f"{path}/{file.name}", file.read_bytes(), public=public)

    def put(self, path: str, content: bytes, *, public: bool = False) -> None:
        """Makes an object, or replaces it."""
        headers = {"x-amz-acl": "public-read"} if public else {}
        self._ask("PUT", f"/{path}", content, **headers)

    def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        # Moto looks whether there is a signature, not at it.
        headers |= {"Content-Type": "application/octet-stream", "Authorization": "AWS AKIDEXAMPLE:signature"}
        request = urllib.request.Request(f"{self.address}{path}", body, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            content: bytes = answer.read()
            return content


def main() -> None:
    """Serves until the process is ended."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    running = make_server("127.0.0.1", 0, Faults(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(running.port, flush=True)
    running.serve_forever()


if __name__ == "__main__":
    main()
