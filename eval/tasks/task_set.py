"""The tasks of an evaluation, as they are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskSpec:
    """One task, group or tag to run.

    Attributes:
        name: lm-eval's.
        num_fewshot: examples before each question; None: as the task defines.
        local: the file that its documents come from, if not the Hub; `ruler.written` writes that of RULER's tasks.
        digest: SHA-256 of everything that defines it.
    """

    name: str
    num_fewshot: int | None
    local: Path | None
    digest: str


@dataclass
class TaskSet:
    """The tasks to run in order, and lm-eval's manager that loads them by name."""

    specs: list[TaskSpec] = field(default_factory=list)
    manager: Any = None
