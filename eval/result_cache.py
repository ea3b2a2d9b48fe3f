"""Results kept between runs: an evaluation that was interrupted goes on, and one that was made is not made again."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhconvert.errors import OutputError

from ..convert.donor.wheel_download import cache_folder


class Store:
    """Outcomes by what they depend on, one JSON file each, in `folder`.

    None: the folder that MHCONVERT_EVAL_CACHE names, or `eval` in the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        named = os.environ.get("MHCONVERT_EVAL_CACHE")
        self.folder = folder or (Path(named) if named else cache_folder() / "eval")

    def load(self, facts: dict[str, Any]) -> Any:
        """What was saved for `facts`; None where nothing was, or nothing that can be read."""
        try:
            return json.loads(self._file(facts).read_text(encoding="utf-8"))["outcome"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, facts: dict[str, Any], outcome: Any) -> None:
        """Keep `outcome`, plain JSON types. Raises OutputError where the folder cannot be written."""
        file = self._file(facts)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_text(json.dumps({"facts": facts, "outcome": outcome}), encoding="utf-8")
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)

    def responses(self, facts: dict[str, Any]) -> str:
        """Where lm-eval keeps the single responses of a model that `facts` describe: a prefix of a file's path."""
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder / f"responses-{_key(facts)}")

    @contextmanager
    def guarded(self, facts: dict[str, Any]) -> Iterator[None]:
        """Faults of the database that `responses` names, in words; one that is damaged is removed."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError as error:
            self.forget_responses(facts)
            raise OutputError(
                f"the responses kept in {self.folder} were damaged ({error}) and are removed; run the same command "
                "again"
            ) from error

    def forget_responses(self, facts: dict[str, Any]) -> None:
        """Remove what `responses` holds, of every process."""
        for file in self.folder.glob(f"responses-{_key(facts)}*"):
            file.unlink(missing_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """A disk that is full, or not ours, becomes an OutputError."""
        try:
            yield
        except OSError as error:
            raise self._unwritable(error.strerror or error) from error

    def _unwritable(self, reason: object) -> OutputError:
        return OutputError(
            f"{self.folder}, which keeps results, cannot be written: {reason}; make room, or set MHCONVERT_EVAL_CACHE"
        )

    def _file(self, facts: dict[str, Any]) -> Path:
        return self.folder / f"{_key(facts)}.json"


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
