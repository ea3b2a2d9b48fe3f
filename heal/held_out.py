"""Measurement on the rows that are held out of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .heal_text import HealText
from .packed_rows import Rows
from .student import Teacher, Weights

Measure = Callable[[], Any]  # creates an accumulator of predictions, `eval.fidelity.Fidelity`


@dataclass(frozen=True)
class Lesson:
    """The teacher, the text, and a function that measures the fidelity of a model on the held-out rows."""

    teacher: Teacher
    text: HealText
    fidelity: Callable[[Any], dict[str, Any]]


@torch.no_grad()
def fidelity(
    student: Any, teacher: Teacher, rows: Rows, measure: Measure, batch: int, device: torch.device
) -> dict[str, Any]:
    """The fidelity of the student's predictions to the teacher's.

    Args:
        measure: creates the accumulator that computes it.
        batch: rows per forward pass.
    """
    accumulator = measure()
    student.eval()
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        student(Rows(part.ids.to(device), part.positions.to(device)), teacher, Weights(), accumulator)
    result: dict[str, Any] = accumulator.result()
    return result


def held_out_values(result: dict[str, Any]) -> dict[str, float]:
    """A measurement on the held-out rows as values of one line of metrics."""
    return {
        "held_out_kl": result["kl"],
        "held_out_perplexity": result["perplexity"]["converted"],
        "held_out_top1": result["top1_agreement"],
    }
