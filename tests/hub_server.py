"""A server with those endpoints of the Hugging Face Hub that downloads and uploads need, for repositories in a folder.

ROOT/models/ORG/NAME and ROOT/datasets/ORG/NAME have the folders refs (a file per branch, with its commit) and commits (a
folder of files per commit). A repository with a file `gated` needs TOKEN. While there is a file ROOT/slow, large files stop
half-way; while there is a file ROOT/down, every answer is 503. ROOT/log lists the requests. Whoever has TOKEN may create
repositories and commit to them; files of weights are uploaded by Git LFS, into ROOT/lfs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ThisIsTheTokenOfTheTestAndNoOther12"
INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
POSTED = re.compile(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|info)/.+")
CHUNK = 1 << 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        pass

    def refuse(self, status: int, code: str) -> None:
        self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True, slow: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(data) if body else 0, CHUNK):
            with suppress(BrokenPipeError, ConnectionResetError):  # the reader was killed
                self.wfile.write(data[start : start + CHUNK])
            while slow and start >= len(data) // 2 and (self.root / "slow").exists():
                time.sleep(0.05)

    def answer(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path)
        with open(self.root / "log", "a") as log:
            log.write(f"{self.command} {path} {self.headers.get('Range') or ''}\n")
        info, file = INFO.fullmatch(path), FILE.fullmatch(path)
        if (self.root / "down").exists() or (info is None and file is None):
            return self.refuse(503 if info or file else 404, "Down")
        if info is not None:
            kind, repo, revision = info[1], info[2], info[4]
        else:
            assert file is not None
            kind, repo, revision = "datasets" if file[1] else "models", file[2], file[3]
        place = self.root / kind / repo
        if not place.is_dir():
            return self.refuse(404, "RepoNotFound")
        reference = place / "refs" / revision
        commit = reference.read_text() if reference.is_file() else revision
        folder = place / "commits" / commit
        if not folder.is_dir():
            return self.refuse(404, "RevisionNotFound")
        if info is not None:
            return self.describe(info[3], repo, commit, folder)
        assert file is not None
        if (place / "gated").exists() and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo")
        if not (folder / file[4]).is_file():
            return self.refuse(404, "EntryNotFound")
        return self.content((folder / file[4]).read_bytes(), commit, body)

    def describe(self, what: str, repo: str, commit: str, folder: Path) -> None:
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        found: Any
        if what == "tree":
            found = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        else:
            files = [{"rfilename": name, "size": size, "blobId": name} for name, size in sizes.items()]
            found = {"id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": files}
        self.answer_json(found)

    def do_PUT(self) -> None:
        """Keep the content of an LFS file."""
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / self.path.rpartition("/")[2]).write_bytes(self.body())
        self.send(200, b"", {})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        with open(self.root / "log", "a") as log:
            log.write(f"POST {path}\n")
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            place = self.root / "models" / repo
            exists = place.exists()
            place.mkdir(parents=True, exist_ok=True)
            if not exists:
                (place / "commits" / "empty").mkdir(parents=True)
                (place / "refs").mkdir()
                (place / "refs" / "main").write_text("empty")
                (place / "visibility").write_text(str(wanted.get("visibility", wanted.get("private"))))
            return self.answer_json({"url": f"{self.address}/{repo}"}, 409 if exists else 200)
        found = POSTED.fullmatch(path)
        if found is None or not (self.root / "models" / found[1]).is_dir():
            return self.refuse(404, "RepoNotFound")
        if found[2] == "commit":
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        if found[2] == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer_json({"files": modes})
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return self.answer_json({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, lines: list[Any]) -> None:
        """Commit the files of a request on top of those of the branch main."""
        place = self.root / "models" / repo
        digest = hashlib.sha1(repr(lines).encode()).hexdigest()
        folder, head = place / "commits" / digest, place / "refs" / "main"
        if head.exists() and head.read_text() != digest:
            shutil.copytree(place / "commits" / head.read_text(), folder, dirs_exist_ok=True)
        folder.mkdir(exist_ok=True)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
            if line["key"] in ("file", "lfsFile"):
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                is_lfs = line["key"] == "lfsFile"
                stored = self.root / "lfs" / value.get("oid", "")
                file.write_bytes(stored.read_bytes() if is_lfs else base64.b64decode(value["content"]))
        head.parent.mkdir(exist_ok=True)
        head.write_text(digest)
        self.answer_json({"commitOid": digest, "commitUrl": f"{self.address}/{repo}/commit/{digest}"})

    def body(self) -> bytes:
        """Return the body of the request, whole or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def content(self, data: bytes, commit: str, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.send(200, data, headers, body, slow=len(data) > 16 * CHUNK)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(206, data[start:stop], headers, body)


class Hub:
    """Repositories below a folder, and a process that serves them while `serving`."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, 0
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server", str(self.root), str(self.port)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            self.port = int(process.stdout.readline())
            yield self
        finally:
            process.kill()
            process.wait()

    def commit(self, repo: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Commit files as the whole content of a repository, such as datasets/ORG/NAME; return the commit."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        digest = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        place = self.root / (repo if repo.startswith("datasets/") else f"models/{repo}")
        for name, data in files.items():
            file = place / "commits" / digest / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / branch).write_text(digest)
        return digest

    def requests(self) -> list[str]:
        """Return the requests since the last call."""
        log = self.root / "log"
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process whose Hub this is, with its caches in the folder `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_OFFLINE"))}
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HOME": str(home / "hf"),
            "RAY_SOUP_CACHE": str(home / "own"),
        }
        return {**kept, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
