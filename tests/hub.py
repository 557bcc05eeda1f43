"""A stand-in for the Hugging Face Hub on loopback, as a program: repositories are folders.

    python hub.py FOLDER        prints its port, then serves FOLDER/org/name/REVISION/...

It answers what `huggingface_hub` asks: what a repository is, and where a file is. Files lie behind signed addresses,
under another name of the host, that run out after some requests. `POST /faults` makes it fail on purpose, and
`GET /log` gives the requests so far. Below `/files/` the folder is served as by any web server.

Repositories are written as by Git LFS: a commit is a folder of its own, which `main` then stands for, and large files
are sent beforehand, to signed addresses or through hf_xet. Only the token `hf_write` may write.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import mmap
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

# Larger files, and those with a zero byte, go to LFS.
_REGULAR_BYTES = 1024

# Files that are larger are sparse: they are served without being read whole.
_SPARSE_BYTES = 1 << 30

# What Git stores in the place of a large file. Here only where hf_xet has the content.
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


class State:
    """What the server knows and does wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()
        self.log: list[list[str]] = []
        self.history: list[list[str]] = []
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

    def handle(self) -> None:
        """Serves until the client hangs up, or is killed."""
        with contextlib.suppress(ConnectionError):
            super().handle()

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
        """Writes to a repository, or sets faults: a JSON object of names and how many times.

        `branches` and `gated` are states. `only` is a regular expression: faults are for the paths that match it.
        `ignored` is a part of the names that a .gitignore in the repositories names.
        """
        path = self.path.partition("?")[0]
        content = self._body()
        if path == "/faults":
            faults = json.loads(content)
            with self.state.lock:
                self.state.branches.update(faults.pop("branches", {}))
                self.state.faults.update(faults)
            self._answer(200)
        elif self._fails(path, content.decode() if path == "/api/repos/create" else "") or not self._may_write():
            return
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self._preupload(match[1], match[2], json.loads(content)["files"])
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._send_where(json.loads(content))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._new_commit(match[1], match[2], [json.loads(line) for line in content.splitlines()])
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        """Takes the content of a large file."""
        path, _, query = self.path.partition("?")
        if self._fails(path):
            return
        content = self._body()
        if not query.startswith("signature=secret-") or hashlib.sha256(content).hexdigest() != path.rpartition("/")[2]:
            self._answer(403)
            return
        self._large(path.rpartition("/")[2]).write_bytes(content)
        self._answer(200)

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _fails(self, path: str, detail: str = "") -> bool:
        """Notes a request, and does what is wrong with it, if something is."""
        with self.state.lock:
            self.state.log.append([self.command, path, detail, self.headers.get("Authorization", "")])
        if not re.search(str(self.state.faults.get("only", "")), path):
            return False
        for fault, status in (("busy", 503), ("limited", 429)):
            if self.state.take(fault):
                if self.command == "PUT":
                    self._body()
                self._answer(status, Retry_After="0")
                return True
        if self.state.take("reset"):
            self._reset()
            return True
        if self.state.take("slow"):
            time.sleep(1)
        return False

    def _reset(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """What a repository is, where a file is, and its content."""
        path, _, query = self.path.partition("?")
        if path == "/log":
            self._answer(200, json.dumps(self.state.log).encode())
            return
        if path == "/history":
            self._answer(200, json.dumps(self.state.history).encode())
            return
        if self._fails(path, self.headers.get("Range", "")):
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(auth-check/write|xet-write-token/main)", path):
            if self._commit(match[1], "main") is None:
                self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif self._may_write():
                # To hf_xet storage is a folder, in which it stores as it does on servers.
                cas, expires = f"local://{self.state.folder}/.xet", 1 << 40
                body = json.dumps({"accessToken": "hf_xet", "exp": expires, "casUrl": cas}).encode()
                # Versions of huggingface_hub before 2.0 read the headers.
                headers = {"X-Xet-Access-Token": "hf_xet", "X-Xet-Token-Expiration": str(expires), "X-Xet-Cas-Url": cas}
                self._answer(200, body, **headers)
            return
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
            {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size, **self._lfs(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        self._answer(200, json.dumps({"id": name, "sha": folder.name, "siblings": siblings}).encode())

    def _may_write(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization == "Bearer hf_write":
            return True
        status, message = (403, "This token is for reading only.") if authorization else (401, "Who are you?")
        self._answer(status, json.dumps({"error": message}).encode(), X_Error_Message=message)
        return False

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if (self.state.folder / name).exists():
            self._answer(409, b"{}")
            return
        folder = self.state.folder / name / secrets.token_hex(20)
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.state.branches[f"{name}@main"] = folder.name
        self._answer(200, json.dumps({"url": f"http://{self.headers['Host']}/{name}", "id": name}).encode())

    def _large(self, oid: str) -> Path:
        (self.state.folder / ".lfs").mkdir(exist_ok=True)
        return self.state.folder / ".lfs" / oid

    def _lfs(self, file: Path) -> dict[str, Any]:
        """What is said of a file beside its name, by where it is stored."""
        if file.stat().st_size > _SPARSE_BYTES:
            return {"blobId": _blob(b"")}
        content = file.read_bytes()
        oid, size = hashlib.sha256(content).hexdigest(), len(content)
        if match := re.fullmatch(_POINTER.format("([0-9a-f]+)", "([0-9]+)").encode(), content):
            oid, size = match[1].decode(), int(match[2])
        elif not self._large(oid).exists():
            return {"blobId": _blob(content)}
        return {"size": size, "lfs": {"oid": oid, "sha256": oid, "size": size, "pointerSize": len(_POINTER) + 64}}

    def _smudged(self, file: Path) -> bytes | mmap.mmap:
        """The content of a file, which is stored elsewhere if it is large."""
        if file.stat().st_size > _SPARSE_BYTES:
            with file.open("rb") as opened:
                return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        content = file.read_bytes()
        match = re.fullmatch(_POINTER.format("([0-9a-f]+)", "([0-9]+)").encode(), content)
        return self._large(match[1].decode()).read_bytes() if match else content

    def _preupload(self, name: str, revision: str, files: list[dict[str, Any]]) -> None:
        folder = self._commit(name, revision)
        if folder is None:
            self._answer(404, b"{}", X_Error_Code="RepoNotFound")
            return
        answers = []
        for file in files:
            large = file["size"] > _REGULAR_BYTES or b"\0" in base64.b64decode(file["sample"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = str(self.state.faults.get("ignored", "\0")) in file["path"]
            if (present := folder / file["path"]).is_file():
                content = present.read_bytes()
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else _blob(content)
            answers.append(answer)
        self._answer(200, json.dumps({"files": answers}).encode())

    def _send_where(self, asked: dict[str, Any]) -> None:
        port = self.server.server_address[1]  # type: ignore[attr-defined]
        answers = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self._large(wanted["oid"]).exists():
                href = f"http://localhost:{port}/large/{wanted['oid']}?signature=secret-{secrets.token_hex(4)}"
                answer["actions"] = {"upload": {"href": href}}
            answers.append(answer)
        transfer = "xet" if "xet" in asked["transfers"] else "basic"
        self._answer(200, json.dumps({"transfer": transfer, "objects": answers}).encode())

    def _new_commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        with self.state.lock:
            parent = self._commit(name, revision)
            header, *operations = [(line["key"], line["value"]) for line in lines]
            if parent is None:
                self._answer(404, b"{}", X_Error_Code="RepoNotFound")
                return
            if header[1].get("parentCommit", parent.name) != parent.name:
                self._answer(412, json.dumps({"error": "A commit has happened since."}).encode())
                return
            folder = parent.with_name(secrets.token_hex(20))
            shutil.copytree(parent, folder)
            for key, value in operations:
                file = folder / value["path"]
                if key == "deletedFile":
                    file.unlink()
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                if key == "file":
                    file.write_bytes(base64.b64decode(value["content"]))
                elif self._large(value["oid"]).exists():
                    file.write_bytes(self._large(value["oid"]).read_bytes())
                else:
                    file.write_text(_POINTER.format(value["oid"], value["size"]))
            self.state.branches[f"{name}@{revision}"] = folder.name
            self.state.history.append([name, folder.name])
        if self.state.take("lost"):
            self._reset()
            return
        url = f"http://{self.headers['Host']}/{name}/commit/{folder.name}"
        self._answer(200, json.dumps({"commitUrl": url, "commitOid": folder.name}).encode())

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
            X_Linked_Size=str(len(self._smudged(stored))),
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
        data, etag = self._smudged(stored), f'"{stored.stat().st_mtime_ns}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            self._answer(200, data[:], ETag=etag)
            return
        part = data[int(match[1]) : int(match[2]) + 1]
        if self.state.take("short"):
            part = part[:-1]
        self._answer(206, part, ETag=etag, Content_Range=f"bytes {match[1]}-{match[2]}/{len(data)}")


def _blob(content: bytes) -> str:
    """What Git calls a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


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

    def history(self, name: str) -> list[Path]:
        """The commits to a repository, one after another: a folder each, with its files."""
        with urllib.request.urlopen(f"{self.endpoint}/history") as answer:
            return [self.folder / name / commit for of, commit in json.load(answer) if of == name]

    def run(self, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs slicecast with this Hub."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": self.endpoint, "JAX_PLATFORMS": "cpu", "HF_HOME": str(self.folder / "home")}
        environment["HF_HUB_DISABLE_XET"] = "1"  # The stand-in does not hand out what it took that way.
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
