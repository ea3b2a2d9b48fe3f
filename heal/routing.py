"""Training of models with routed heads (MoH, arXiv 2410.11842): the load-balance loss and the load of the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import HealError

from ..convert.recipe.heal_settings import HealSettings
from .student import SCORES, Student, Weights, choose_trained


class RoutingStudent(Student):
    """A student with routed heads."""

    @classmethod
    def of(cls, model: Any, settings: HealSettings, vocab_size: int) -> RoutingStudent:
        """The student for `model`; the scores of a fixed router are not trained and have no gradient."""
        trained = settings.router == "trained"
        for module in model.modules():
            if hasattr(module, "straight_through"):
                module.straight_through = trained
        chosen = choose_trained(model, settings.train, settings.rank, None if trained else SCORES)
        return cls(chosen, vocab_size)

    def balance(self, weights: Weights) -> Tensor | None:
        """The load-balance loss Σ P f of the last forward pass, mean over layers; None if its weight is 0.

        Rows are packed, so there is no padding to exclude.
        """
        return self.model.load_balance() if weights.balance else None

    @torch.no_grad()
    def end_step(self, done: float) -> dict[str, Any]:
        """The fraction of the last tokens that each head of each layer was routed, as "head_load"."""
        return {"head_load": [[round(f, 4) for f in share.tolist()] for _, share in self.model.head_load()]}


def check(config: Any, settings: HealSettings) -> None:
    """Raises HealError if the router is to be trained and the model has none."""
    if getattr(config, "head_router", None) is None and settings.router == "trained":
        raise HealError(
            "the checkpoint routes no heads (--to moh does); leave --router and the loss's balance out"
        )
