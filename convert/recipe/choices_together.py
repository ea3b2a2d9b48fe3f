"""Which choices of a recipe exclude each other, or need one another."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import MhconvertError

from ..methods.registry import ADAPTERS, CACHE_METHODS
from ..validation.field_types import changed_fields
from .tolerance import on_policy

OF_THE_PASS = (
    "tolerance",
    "prompts",
    "calibration",
    "effort",
    "fit_steps",
    "dtype",
    "device",
    "max_shard_size",
    "verify",
    "heal",
)  # no adapter has a use for these


def require_together(recipe: Any) -> None:
    """Raise MhconvertError for choices that do not go together."""
    if recipe.method in ADAPTERS:
        _require_no_pass(recipe)
    _require_one_fusion(recipe)
    if recipe.prompts is not None and not recipe.prompts.strip():
        raise MhconvertError("prompts is empty; name a file, or leave it out for our own")
    if recipe.prompts is not None and not on_policy(recipe.tolerance):
        raise MhconvertError(
            "prompts are of a tolerance on generation: give generation=NATS, or leave them out"
        )
    if recipe.tolerance is not None:
        _require_free_budget(recipe)


def _require_free_budget(recipe: Any) -> None:
    """Raise MhconvertError where there is no budget that the tolerance would decide."""
    if len(recipe.passes) > 1:
        raise MhconvertError(
            "a tolerance decides the budget of one conversion; search that of the first step alone, with "
            f"{_first(recipe)} --tolerance {recipe.tolerance} and whatever else that step has, and convert the folder "
            "that it makes, or give the chain the budget found"
        )
    if recipe.method not in CACHE_METHODS:
        raise MhconvertError(
            f"a tolerance decides a KV budget, which {recipe.method} does not have; leave it out"
        )
    settings = recipe.settings
    if settings.at_budget(type(settings)().kv_budget) != settings:  # which refuses explicit sizes
        raise MhconvertError(
            f"a tolerance decides the KV budget; leave out kv_budget={settings.kv_budget} or the tolerance"
        )


def _first(recipe: Any) -> str:
    """The options of the first step of a chain alone, as later ones need it."""
    first = recipe.passes[0]
    bits = getattr(first.settings, "kv_bits", None)
    return f"--to {first.method}" + (f" --kv-bits {bits}" if bits else "")


def _require_one_fusion(recipe: Any) -> None:
    """Raise MhconvertError where only one of conversion and healing leaves the fusion of heads to training."""
    trained = getattr(recipe.settings, "fusion", None) == "trained"
    if recipe.heal is not None and trained != (recipe.heal.fusion is not None):
        raise MhconvertError(
            "with fusion: trained heads become one while healing, which must say how many: give heal.fusion: 2 "
            "beside it in a recipe, or convert first and then mhconvert heal CKPT --fusion 2"
            if trained
            else "heal.fusion is of heads still to be fused: give settings.fusion: trained, or leave it out"
        )


def _require_no_pass(recipe: Any) -> None:
    for name in changed_fields(recipe):
        if name in OF_THE_PASS:
            raise MhconvertError(
                f"{name} does not apply to {recipe.method}, which adds an adapter and rewrites no layer; leave it out"
            )
