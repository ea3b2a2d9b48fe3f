"""A server that a test starts by `mhconvert serve`, asks over HTTP, and sees end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_TO_START = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(words: list[Any], said: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mhconvert WORD ...` in a session of its own once it answers; what is left of the session is killed."""
    with said.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "mhconvert.cli.main", *map(str, words)],
            stdout=file,
            stderr=file,
            start_new_session=True,
            # A test run in the background of a script ignores Ctrl-C, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            end = time.monotonic() + SECONDS_TO_START
            while not healthy(port):
                text = said.read_text(encoding="utf-8", errors="replace")[-4000:]
                assert server.poll() is None, text
                assert time.monotonic() < end, text
                time.sleep(0.5)
            yield server
        finally:
            for pid in processes_of(server.pid):
                os.kill(pid, signal.SIGKILL)
            server.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def processes_of(session: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == session and state != "Z":
            found.append(int(folder.name))
    return found


def gone(session: int) -> bool:
    """Whether all processes of the session end within some seconds."""
    end = time.monotonic() + 20
    while processes_of(session) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes_of(session)
