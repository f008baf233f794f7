"""The part of the Hugging Face hub's HTTP face that uploads and downloads of small files use, on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=list)  # path → content, after each commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1] if self.commits else {}

    def at(self, revision: str) -> dict[str, bytes] | None:
        """``main``, or a commit's name: its number as forty hex digits."""
        if revision == "main":
            return self.files
        known = {commit_name(number): files for number, files in enumerate(self.commits)}
        return known.get(revision)


def commit_name(number: int) -> str:
    return f"{number + 1:040x}"


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header(
            "Content-Type", "application/json" if isinstance(content, dict) else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, path = self.body(), urlsplit(self.path).path
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"  # the user whose token it is
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(
                name, Repository("private" in (asked.get("visibility"), asked.get("private") and "private"))
            )
            self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), body)
        else:
            self.answer(404, {"error": path})

    def commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.hub.messages.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        repository.commits.append(files)
        oid = commit_name(len(repository.commits) - 1)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = self.hub.repositories.get("/".join(parts[2:4]))
            found = repository.at(parts[5] if len(parts) > 5 else "main") if repository else None
            if repository is None or found is None:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            sha = commit_name(repository.commits.index(found)) if repository.commits else commit_name(-1)
            siblings = [{"rfilename": name} for name in found]
            self.answer(200, {"id": "/".join(parts[2:4]), "modelId": "x", "sha": sha, "siblings": siblings, "tags": []})
            return
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        files = repository.at(parts[3])
        if files is None:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return
        content = files.get("/".join(parts[4:]))
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        sha = commit_name(next(n for n, commit in enumerate(repository.commits) if commit is files))
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)
