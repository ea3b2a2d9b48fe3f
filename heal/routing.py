"""Training of routed heads: the balance of their load, in the loss and in the metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import HealError

from ..convert.recipe.heal_settings import HealSettings
from .student import SCORES, Student, Weights, choose_trained


class RoutingStudent(Student):
    """A mixture-of-head model (MoH, arXiv 2410.11842), whose loss may ask for a balanced load."""

    @classmethod
    def of(cls, model: Any, settings: HealSettings, vocab_size: int) -> RoutingStudent:
        """Return the student for `model`; with a fixed router its scores get no gradient and pass none on."""
        trained = settings.router == "trained"
        for module in model.modules():
            if hasattr(module, "straight_through"):
                module.straight_through = trained
        chosen = choose_trained(model, settings.train, settings.rank, None if trained else SCORES)
        return cls(chosen, vocab_size)

    def balance(self, weights: Weights) -> Tensor | None:
        """Σ P f over the routed heads, mean of the layers, of the forward pass before; None where it counts nothing.

        Rows are packed, so every token is one of text.
        """
        return self.model.load_balance() if weights.balance else None

    @torch.no_grad()
    def end_step(self, done: float) -> dict[str, Any]:
        """Return the share of the last rows' tokens that each routed head of each layer had."""
        return {"head_load": [[round(f, 4) for f in share.tolist()] for _, share in self.model.head_load()]}


def check(config: Any, settings: HealSettings) -> None:
    """Raise HealError where router settings are given for a model without a router."""
    if getattr(config, "head_router", None) is None and settings.router == "trained":
        raise HealError(
            "the checkpoint routes no heads (--to moh does); leave --router and the loss's balance out"
        )
