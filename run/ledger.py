"""The record of a run's finished stages, kept beside its output as `OUT.run.json`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError, OutputError

from ..convert.checkpoint.fingerprint import of_folder
from ..convert.storage.output_folder import PARTIAL


class Ledger:
    """For each finished stage the hash of its inputs and of its output; a stage is done while neither has changed."""

    def __init__(self, output: Path) -> None:
        self.file = output.with_name(f"{output.name}.run.json")
        try:
            self._stages = dict(json.loads(self.file.read_text(encoding="utf-8"))["stages"])
        except (OSError, ValueError, KeyError, TypeError):  # nothing that can be relied on: every stage runs
            self._stages = {}

    def done(self, stage: str, inputs: Any) -> dict[str, Any] | None:
        """Return what `record` stored for `stage` if its inputs and its output are unchanged, else None."""
        entry = self._stages.get(stage)
        if not isinstance(entry, dict) or entry.get("inputs") != digest(inputs):
            return None
        output = entry.get("output")
        if output is not None and mark(Path(output)) != entry.get("mark"):
            return None
        return entry

    def known(self, stage: str, output: Path) -> bool:
        """Whether `output` was made by an earlier run of `stage`, which may then replace it."""
        entry = self._stages.get(stage)
        return isinstance(entry, dict) and entry.get("output") == str(output)

    def record(self, stage: str, inputs: Any, output: Path | None, **facts: Any) -> None:
        """Remember that `stage` is done. output: a folder or a file that it made. Raises OutputError."""
        entry = {"inputs": digest(inputs), **facts}
        if output is not None:
            entry |= {"output": str(output), "mark": mark(output)}
        self._stages[stage] = entry
        unfinished = self.file.with_name(self.file.name + PARTIAL)
        try:
            unfinished.write_text(json.dumps({"stages": self._stages}, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, self.file)
        except OSError as error:
            raise OutputError(f"{self.file} cannot be written: {error.strerror or error}") from error


def digest(inputs: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def mark(output: Path) -> str | None:
    """Return the hash of a checkpoint's model files, or of a file; None where it does not exist."""
    try:
        if output.is_dir():
            return of_folder(output)
        return hashlib.sha256(output.read_bytes()).hexdigest()
    except (OSError, CheckpointError):
        return None
