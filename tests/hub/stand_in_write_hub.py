"""A Hub on 127.0.0.1 that can be written to: the routes that huggingface_hub uses to push a model, and to load it back.

It offers plain LFS storage; a client with hf_xet must be told not to use Xet (HF_HUB_DISABLE_XET).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretOfTheTests"
USER = "tester"
Files = dict[str, bytes]


@dataclass
class Repo:
    """commits: hash -> the files there. branches: name -> hash. lfs: the paths that are stored as blobs."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        """The hash of a new commit with these files on `branch`."""
        text = f"{len(self.commits)} {branch} {message} {sorted(files)}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> Files | None:
        """The files of a branch or a commit; None where there is none."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches `at`.

    status 0: the connection is dropped, after the request has been carried out if `late`; else that status, with
    `headers`, and nothing is carried out.
    """

    at: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False
    error: str = ""


class WriteHub:
    """`repos`: id -> Repo. `blobs`: sha256 -> content. `faults`: to come. `requests`: what was asked, in order."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.endpoint = ""
        self.loses: str | None = None  # a file that the next commits forget

    def count(self, at: str) -> int:
        """How many requests matched `at`."""
        return sum(bool(re.search(at, request)) for request in self.requests)

    def fault_at(self, request: str) -> Fault | None:
        """The fault that this request meets."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.at, request):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: WriteHub

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault_at(f"{self.command} {path}")
        self.silent = fault is not None and fault.status == 0
        if fault is not None and not fault.late:
            if fault.status:
                self.send(fault.status, {"error": fault.error}, fault.headers)
            return
        self.route(path)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self, path: str) -> None:
        if path.startswith("/blob/"):
            return self.blob(path.removeprefix("/blob/"))
        if "/resolve/" in path:
            return self.resolve(path)
        writes = self.command != "GET" and self.command != "HEAD"
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch(match[1])
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)/([^/]+(?:/\d+)?)(/.*)?)?", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        kind, revision = match[2], match[3] or "main"
        if kind == "branch":
            taken = revision in repo.branches
            repo.branches.setdefault(revision, repo.branches["main"])
            return self.send(409 if taken else 200, {})
        files = repo.at(revision)
        if files is None:
            return self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if kind == "preupload":
            return self.preupload(files)
        if kind == "commit":
            return self.commit(match[1], revision, dict(files))
        if kind == "tree":
            return self.tree(files, match[4])
        siblings = [{"rfilename": name} for name in files]
        sha = repo.branches.get(revision, revision)
        self.send(200, {"id": match[1], "sha": sha, "private": repo.private, "siblings": siblings})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo"} | url)
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.send(200, url)

    def preupload(self, files: Files) -> None:
        rows = []
        for file in json.loads(self.body)["files"]:
            path, held = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if held is not None:
                row["oid"] = sha256(held) if mode == "lfs" else git_hash(held)
            rows.append(row)
        self.send(200, {"files": rows})

    def batch(self, repo: str) -> None:
        rows = []
        for item in json.loads(self.body)["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                row["actions"] = {"upload": {"href": f"{self.hub.endpoint}/blob/{item['oid']}"}}
            rows.append(row)
        self.send(200, {"transfer": "basic", "objects": rows})

    def blob(self, oid: str) -> None:
        assert sha256(self.body) == oid
        assert "Authorization" not in self.headers
        self.hub.blobs[oid] = self.body
        self.send(200, {})

    def commit(self, repo: str, branch: str, files: Files) -> None:
        head, *operations = [json.loads(line) for line in self.body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        files.pop(self.hub.loses or "", None)
        name = self.hub.repos[repo].commit(branch, files, head["value"]["summary"])
        self.send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{name}", "commitOid": name})

    def tree(self, files: Files, below: str | None) -> None:
        if below:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            for path, content in sorted(files.items())
        ]
        self.send(200, rows)

    def resolve(self, path: str) -> None:
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.hub.repos.get(name)
        files = repo.at(revision) if repo else None
        if repo is None or files is None:
            code = "RevisionNotFound" if repo else "RepoNotFound"
            return self.send(404, {}, {"X-Error-Code": code})
        commit = {"X-Repo-Commit": repo.branches.get(revision, revision)}
        if file not in files:
            return self.send(404, {}, commit | {"X-Error-Code": "EntryNotFound"})
        self.send(200, files[file], commit | {"ETag": f'"{git_hash(files[file])}"'})

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        if self.silent:
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def write_hub() -> Iterator[WriteHub]:
    """A running stand-in at `.endpoint`, shut down afterwards."""
    hub = WriteHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
