"""A stand-in for Google Cloud Storage on loopback, as a program: `gcp-storage-emulator`, with what TensorStore needs.

    python bucket_server.py BUCKET...     prints its port, then serves empty buckets, in memory

The emulator ignores conditions on generations and the bounds of lists, and does not say which generation it delivers;
that is added here. `GET /log` gives the requests so far. `POST /faults` makes requests fail on purpose: it takes a JSON
object that says how many times each fault is to happen, and with `only`, a regular expression, to which requests.
"""

import contextlib
import functools
import http.server
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

# The path of one object; TensorStore and gcsfs spell it differently. And that of new ones.
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
_UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")

# How much later a slow answer comes.
_SLOW_SECONDS = 1.0

_FAULTS = ("busy", "limited", "forbidden", "reset", "slow", "short")

_STATUS = {"busy": 503, "limited": 429, "forbidden": 403}


class Buckets(Storage):  # type: ignore[misc]  # The emulator has no types.
    """Buckets in memory. The emulator would describe all objects anew with each change, and keep what is removed."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.lock = threading.Lock()

    def _write_config_to_file(self) -> None:
        pass

    def _bucket_soft_delete_retention_seconds(self, _: str) -> int:
        return 0

    def generation(self, bucket: str, name: str) -> int:
        """The generation of an object; 0 stands for none, as in conditions."""
        return int(self.objects.get(bucket, {}).get(name, {}).get("generation", 0))


class State:
    """What has been asked, and what is to go wrong."""

    def __init__(self) -> None:
        self.log: list[list[Any]] = []
        self.faults: dict[str, Any] = {}
        self.lock = threading.Lock()

    def note(self, method: str, path: str, byte_range: str, nbytes: int) -> str:
        """Notes a request, and says what is to go wrong with it, if something is."""
        with self.lock:
            self.log.append([method, path, byte_range, nbytes, time.time()])
            if re.search(self.faults.get("only", ""), f"{method} {path}"):
                for fault in _FAULTS:
                    if self.faults.get(fault, 0) > 0:
                        self.faults[fault] -= 1
                        return fault
        return ""


class Handler(server.RequestHandler):  # type: ignore[misc]
    """One connection."""

    # All answers say how long they are, so connections may stay open. With HTTP/1.0 clients would also wait a second
    # before each large body.
    protocol_version = "HTTP/1.1"

    def __init__(self, state: State, *arguments: Any):
        self.state = state
        self.generation = 0
        super().__init__(*arguments)

    def handle(self) -> None:
        """Serves until the client hangs up, or is killed."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def end_headers(self) -> None:
        """Says which generation is delivered."""
        if self.command == "GET" and self.generation:
            self.send_header("x-goog-generation", str(self.generation))
        super().end_headers()

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.generation = 0
        if self.path == "/log":
            self._answer(200, json.dumps(self.state.log).encode())
            return
        if self.path == "/faults":
            with self.state.lock:
                self.state.faults = json.loads(body)
            self._answer(200)
            return
        fault = self.state.note(self.command, self.path, self.headers.get("Range", ""), len(body))
        if fault in _STATUS:
            self._answer(_STATUS[fault])
            return
        if fault == "slow":
            time.sleep(_SLOW_SECONDS)
        if fault == "reset":
            self._hang_up()
            return
        connection, answer = (self.rfile, self.wfile), io.BytesIO()
        self.rfile, self.wfile = io.BytesIO(body), answer
        try:
            with self.storage.lock:
                self._route()
        finally:
            self.rfile, self.wfile = connection
        content = answer.getvalue()
        if fault == "short":  # Less than what was announced.
            self.wfile.write(content[:-1])
            self._hang_up()
        else:
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815  The names that http.server calls.

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _route(self) -> None:
        """Lets the emulator answer, if the request's conditions hold."""
        parts = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(parts.query).items()}
        if matched := _OBJECT.fullmatch(parts.path):
            self.generation = self.storage.generation(matched[1], urllib.parse.unquote(matched[2]))
        elif matched := _UPLOAD.fullmatch(parts.path):
            self.generation = self.storage.generation(matched[1], query.get("name", ""))
        if query.get("ifGenerationMatch", str(self.generation)) != str(self.generation):
            self._answer(412)
        elif self.generation and query.get("ifGenerationNotMatch") == str(self.generation):
            self._answer(304)
        else:
            server.Router(self).handle(self.command)


def list_objects(request: Any, response: Any, storage: Any) -> None:
    """Lists objects between two names, as TensorStore asks for them."""
    objects.ls(request, response, storage)
    if not response._content:
        return
    found = json.loads(response._content)
    first, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
    found["items"] = [item for item in found["items"] if first <= item["name"] and (not end or item["name"] < end)]
    response.json(found)


class BucketServer:
    """A running stand-in.

    Attributes:
        address: Its URL.
    """

    def __init__(self, *names: str):
        """A stand-in with these buckets, in a process of its own."""
        self._process = subprocess.Popen([sys.executable, __file__, *names], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes TensorStore and gcsfs use it."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": self.address,
            "NO_GCE_CHECK": "true",
        }

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def faults(self, **faults: Any) -> None:
        """Makes it fail so many times, and forgets earlier faults; see the server."""
        self._ask("POST", "/faults", json.dumps(faults).encode())

    def log(self) -> list[list[Any]]:
        """Method, path, range, size of the body, and time of each request so far."""
        found: list[list[Any]] = json.loads(self._ask("GET", "/log"))
        return found

    def upload(self, bucket: str, name: str, content: bytes) -> None:
        """Makes an object."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", content)

    def remove(self, bucket: str, prefix: str) -> None:
        """Removes the objects whose names begin so."""
        found = self._ask("GET", f"/storage/v1/b/{bucket}/o?{urllib.parse.urlencode({'prefix': prefix})}")
        for item in json.loads(found)["items"]:
            self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(item['name'], safe='')}")

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.address}{path}", body or None, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            content: bytes = answer.read()
            return content


def main(*names: str) -> None:
    """Serves until the process is ended."""
    logging.disable()  # It is loud about objects that are not there.
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler is objects.ls:
                handlers[method] = list_objects
    storage = Buckets()
    for name in names:
        buckets.create_bucket(name, storage)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, State(), storage))
    print(running.server_address[1], flush=True)
    running.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
