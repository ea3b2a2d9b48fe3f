"""A lock on the name of an output, held in a hidden file beside it from before the work until after the last rename."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO


class OutputLock:
    """The lock of `output`; the file is there only while a run has it, or after one was killed."""

    def __init__(self, output: Path):
        self.file = output.with_name(f".{output.name}.lock")
        self._stream: IO[str] | None = None

    def acquire(self) -> bool:
        """Whether no other run has the lock. Raises OSError where the file cannot be made."""
        while True:
            stream = open(  # noqa: SIM115
                os.open(self.file, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600),
                "w",
                encoding="utf-8",
            )
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.close()
                return False
            with suppress(FileNotFoundError):  # the run that had it may have removed the file in between
                if os.path.samestat(os.fstat(stream.fileno()), os.lstat(self.file)):
                    self._stream = stream
                    return True
            stream.close()

    def release(self) -> None:
        """Give the lock back, if this run has it."""
        if self._stream is not None:
            self.file.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None
