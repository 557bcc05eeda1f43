"""A stand-in for the Hugging Face Hub on loopback, as a program: repositories are folders.

    python hub.py FOLDER        prints its port, then serves FOLDER/org/name/REVISION/...

It answers what `huggingface_hub` asks: what a repository is, and where a file is. Files lie behind signed addresses,
under another name of the host, that run out after some requests. `POST /faults` makes it fail on purpose, and
`GET /log` gives the requests so far. Below `/files/` the folder is served as by any web server.
"""

import functools
import http.server
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any


class State:
    """What the server knows and does wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()
        self.log: list[list[str]] = []
        self.uses: dict[str, int] = {}
        self.branches: dict[str, str] = {}
        self.faults: dict[str, Any] = {}

    def take(self, fault: str) -> bool:
        """Whether a fault is to happen now; each is given a number of times."""
        with self.lock:
            left = int(self.faults.get(fault, 0))
            self.faults[fault] = max(left - 1, 0)
            return left > 0


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def __init__(self, state: State, *arguments: Any):
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the log is asked for."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Sets faults: a JSON object of names and how many times; `branches` and `gated` are states."""
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.lock:
            self.state.branches.update(content.pop("branches", {}))
            self.state.faults.update(content)
        self._answer(200)

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """What a repository is, where a file is, and its content."""
        path, _, query = self.path.partition("?")
        if path == "/log":
            self._answer(200, json.dumps(self.state.log).encode())
            return
        with self.state.lock:
            self.state.log.append(
                [self.command, path, self.headers.get("Range", ""), self.headers.get("Authorization", "")]
            )
        for fault, status in (("busy", 503), ("limited", 429)):
            if self.state.take(fault):
                self._answer(status, Retry_After="0")
                return
        if self.state.take("reset"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if self.state.take("slow"):
            time.sleep(1)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/(.+)", path):
            self._content(match[1], query)
        elif match := re.fullmatch(r"/files/(.+)", path):
            self._file(match[1])
        else:
            self._answer(404)

    def _commit(self, name: str, revision: str) -> Path | None:
        """The folder of a revision; a branch stands for one."""
        revision = self.state.branches.get(f"{name}@{revision}", revision)
        folder = self.state.folder / name / revision
        return folder if folder.is_dir() else None

    def _allowed(self, name: str) -> bool:
        if self.state.faults.get("gated") == name and self.headers.get("Authorization") != "Bearer hf_right":
            self._answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
            return False
        return True

    def _info(self, name: str, revision: str) -> None:
        folder = self._commit(name, revision)
        if folder is None:
            known = (self.state.folder / name).is_dir()
            code, status = ("RevisionNotFound", 404) if known else ("RepoNotFound", 401)
            self._answer(status, b"{}", X_Error_Code=code)
            return
        if not self._allowed(name):
            return
        siblings = [
            {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        self._answer(200, json.dumps({"id": name, "sha": folder.name, "siblings": siblings}).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        folder = self._commit(name, revision)
        if folder is None or not (folder / file).is_file():
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        if not self._allowed(name):
            return
        stored = folder / file
        etag = f'"{stored.stat().st_mtime_ns}"'
        key = secrets.token_hex(4)
        port = self.server.server_address[1]  # type: ignore[attr-defined]
        # Another name of the same host, as the Hub's storage is another host.
        location = f"http://localhost:{port}/cdn/{name}/{folder.name}/{file}?signature=secret-{key}"
        self._answer(
            302,
            Location=location,
            X_Repo_Commit=folder.name,
            X_Linked_Etag=etag,
            X_Linked_Size=str(stored.stat().st_size),
        )

    def _content(self, path: str, query: str) -> None:
        with self.state.lock:
            self.state.uses[query] = self.state.uses.get(query, 0) + 1
            expired = self.state.uses[query] > int(self.state.faults.get("uses", 1 << 30))
        if expired or "signature=secret-" not in query:
            self._answer(403)
            return
        self._file(path)

    def _file(self, path: str) -> None:
        stored = self.state.folder / path
        if not stored.is_file():
            self._answer(404)
            return
        data, etag = stored.read_bytes(), f'"{stored.stat().st_mtime_ns}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            self._answer(200, data, ETag=etag)
            return
        part = data[int(match[1]) : int(match[2]) + 1]
        if self.state.take("short"):
            part = part[:-1]
        self._answer(206, part, ETag=etag, Content_Range=f"bytes {match[1]}-{match[2]}/{len(data)}")


class Hub:
    """A running stand-in, and the folder with its repositories."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._process = subprocess.Popen([sys.executable, __file__, folder], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def faults(self, **faults: Any) -> None:
        """Makes it fail so many times; see the server."""
        urllib.request.urlopen(f"{self.endpoint}/faults", json.dumps(faults).encode()).close()

    def log(self) -> list[list[str]]:
        """Method, path, range and authorization of each request so far."""
        with urllib.request.urlopen(f"{self.endpoint}/log") as answer:
            found: list[list[str]] = json.load(answer)
            return found

    def run(self, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs slicecast with this Hub."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.endpoint, "JAX_PLATFORMS": "cpu", "HF_HOME": str(self.folder / "home")}
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-P", "-m", "slicecast.convert", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def main(folder: str) -> None:
    """Serves until the process is ended."""
    state = State(Path(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
