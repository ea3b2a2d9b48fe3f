"""Heads that learn which tokens they are for: the balance of their load, in the loss and in the metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.convert.errors import HealError
from mhconvert.heal.student import Student, Weights


class RoutingStudent(Student):
    """A mixture-of-head model (MoH, arXiv 2410.11842), whose loss may ask for a balanced load."""

    def balance(self, weights: Weights) -> Tensor | None:
        """Σ P f over the routed heads, mean of the layers, of the forward pass before; None where it counts nothing.

        Rows are packed, so every token is one of text.
        """
        return self.model.load_balance() if weights.balance else None

    @torch.no_grad()
    def end_step(self, done: float) -> dict[str, Any]:
        """The share of the last rows' tokens that each routed head of each layer had."""
        return {"head_load": [[round(f, 4) for f in share.tolist()] for _, share in self.model.head_load()]}


def check(config: Any, loss: dict[str, float]) -> None:
    """Raises HealError where a balance is asked for and no heads are routed."""
    if loss.get("balance") and getattr(config, "head_router", None) is None:
        raise HealError("the checkpoint routes no heads (--to moh does); leave balance out of the loss")
