"""Processes that end with all that they started, in whatever session that is: `torchrun` gives its workers one each."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

GONE_SECONDS = 10.0  # a killed process that the device does not let go is waited for no longer


@contextlib.contextmanager
def ended_together(name: str) -> Iterator[dict[str, str]]:
    """Yields what the environment of a process has to have: at the end whatever inherited it is killed and gone.

    By its environment and not by its parent, since the children of a process that has ended have another. Linux only:
    it is read from /proc. `name` is the variable's, another one in each nesting.
    """
    value = secrets.token_hex(8)
    try:
        yield {name: value}
    finally:
        until = time.monotonic() + GONE_SECONDS
        while (running := bearing(f"{name}={value}")) and time.monotonic() < until:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


def bearing(mark: str) -> list[int]:
    """The processes that were started with `mark` in their environment and run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found
