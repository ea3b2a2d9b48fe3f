"""A Hub on 127.0.0.1 with just the routes that huggingface_hub uses to look up and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub:
    """`repos`: id -> folder that is served. `refused`: id -> (status, X-Error-Code). `requests`: what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def downloads(self) -> list[str]:
        """Paths in their repository of the files that were fetched, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.requests
            if path.startswith("GET ") and "/resolve/" in path
        ]


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A running stand-in at `.endpoint`, shut down afterwards."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo in hub.refused or repo not in hub.repos:
                return self.send(*hub.refused.get(repo, (404, "RepoNotFound")), b"{}", with_body)
            folder = hub.repos[repo]
            if path.startswith("/api/models"):
                return self.api(folder, rest, repo, with_body)
            if rest[1] not in ("main", COMMIT):
                return self.send(404, "RevisionNotFound", b"{}", with_body)
            file = folder / "/".join(rest[2:])
            if not file.is_file():
                return self.send(404, "EntryNotFound", b"{}", with_body)
            return self.send(200, "", file.read_bytes(), with_body)

        def api(self, folder: Path, rest: list[str], repo: str, with_body: bool) -> None:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [file.relative_to(folder).as_posix() for file in files]
            if rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "size": f.stat().st_size, "oid": blob(f)}
                    for name, f in zip(names, files, strict=True)
                ]
                return self.send(200, "", json.dumps(rows).encode(), with_body)
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                return self.send(404, "RevisionNotFound", b"{}", with_body)
            facts = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, "", json.dumps(facts).encode(), with_body)

        def send(self, status: int, code: str, body: bytes, with_body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def blob(file: Path) -> str:
    """The id that the tree listing gives `file`: the ETag it is served with."""
    return hashlib.sha1(file.read_bytes()).hexdigest()
