"""Metrics of a healing run: JSON lines, TensorBoard, and the picture in the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from mhconvert.errors import HealError


class Metrics:
    """Appends to `file`; with `tensorboard`, to a TensorBoard log in that folder too.

    A resumed run drops what was written after `step`, its durable checkpoint.
    """

    def __init__(self, file: Path, step: int, tensorboard: Path | None):
        self.file = file
        self.entries = [entry for entry in read(file) if entry["step"] <= step] if step else []
        file.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        self._board: Any = None
        if tensorboard is not None:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def add(self, step: int, **values: Any) -> None:
        """Write one line. step: the step that the values belong to; 0: before the first."""
        entry = {"step": step} | values
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics file, without a truncated last one."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def require_tensorboard() -> None:
    """Raise HealError where a TensorBoard log is wanted and TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise HealError(
            "--tensorboard needs tensorboard: pip install 'mhconvert[tensorboard]'; metrics.jsonl does without"
        )
