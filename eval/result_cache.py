"""Results of evaluations, stored between runs: an interrupted evaluation resumes, a finished one is not repeated."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from mhconvert.errors import OutputError
from mhconvert.library_versions import versions

from ..convert.donor.wheel_download import cache_folder


class Store:
    """Outcomes in a folder, one JSON file each, by a key: a dictionary of everything that an outcome depends on
    beside the versions of libraries.

    Attributes:
        folder: by default MHCONVERT_EVAL_CACHE, or `eval` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        variable = os.environ.get("MHCONVERT_EVAL_CACHE")
        self.folder = folder or (Path(variable) if variable else cache_folder() / "eval")

    def load(self, key: dict[str, Any]) -> Any:
        """The outcome saved under `key`; None where there is none that can be read."""
        try:
            return json.loads(self._file(key).read_text(encoding="utf-8"))["outcome"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, key: dict[str, Any], outcome: Any) -> None:
        """Stores `outcome`, of plain JSON types, under `key`. Raises OutputError where the folder is not writable."""
        file = self._file(key)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_text(json.dumps({"facts": key, "outcome": outcome}), encoding="utf-8")
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)

    def responses(self, key: dict[str, Any]) -> str:
        """Path prefix of the database in which lm-eval keeps the single responses of a model."""
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder / f"responses-{_digest(key)}")

    @contextmanager
    def database_errors(self, key: dict[str, Any]) -> Iterator[None]:
        """Raises OutputError for errors of the database that `responses` names; a damaged one is removed."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError as error:
            self.forget_responses(key)
            raise OutputError(
                f"the responses kept in {self.folder} were damaged ({error}) and are removed; run the same command "
                "again"
            ) from error

    def forget_responses(self, key: dict[str, Any]) -> None:
        """Removes the databases that `responses` names, of all processes."""
        for file in self.folder.glob(f"responses-{_digest(key)}*"):
            file.unlink(missing_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Raises OutputError where the folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise self._unwritable(error.strerror or error) from error

    def _unwritable(self, reason: object) -> OutputError:
        return OutputError(
            f"{self.folder}, which keeps results, cannot be written: {reason}; make room, or set MHCONVERT_EVAL_CACHE"
        )

    def _file(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{_digest(key)}.json"


def digest(facts: Any) -> str:
    """The SHA-256 of what JSON makes of `facts`: a short stand-in for them in a key."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(key: dict[str, Any]) -> str:
    """The hash of a key, and of the libraries that make an outcome."""
    facts = key | {"versions": versions() | {"lm_eval": _harness_version()}}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _harness_version() -> str | None:
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return None
