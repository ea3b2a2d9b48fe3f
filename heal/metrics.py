"""Metrics of a healing run as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhconvert import extras
from mhconvert.errors import HealError


class Metrics:
    """Appends metrics to a file of JSON lines and, if `tensorboard` is set, to a TensorBoard log in that folder.

    Args:
        step: of the training checkpoint from which the run resumes; later entries are dropped. 0 for a new run.
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
        """Write the values of `step`, 0 for those before the first step."""
        entry = {"step": step} | values
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def facts(self) -> dict[str, Any]:
        """What a report says of the training: predictions learnt from, speed, and the student's own texts if any."""
        steps = [entry for entry in self.entries if "predictions" in entry]
        facts = {
            "predictions": sum(int(entry["predictions"]) for entry in steps),
            "tokens_per_second": steps[-1]["tokens_per_second"] if steps else None,
        }
        own = [entry for entry in steps if "own_rows" in entry]
        names = ("rows", "empty", "loops")
        if own:
            facts["own_texts"] = {name: sum(entry[f"own_{name}"] for entry in own) for name in names}
        return facts

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, without a truncated last line; [] if there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def require_tensorboard() -> None:
    """Raises HealError if TensorBoard is not installed."""
    extras.require("tensorboard", "--tensorboard", "metrics.jsonl does without", HealError)
