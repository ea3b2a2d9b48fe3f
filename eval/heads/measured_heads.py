"""The heads that a word for `protect` means: measured on the donor once, and kept for the next run."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import torch

from mhconvert.errors import BudgetError, OutputError
from mhconvert.progress import Listener

from ...convert.donor.donor import open_donor
from ...convert.layer_pass.first_donor import with_same_heads
from ...convert.open_model import of_model, open_model
from ...convert.recipe.recipe import Recipe
from ..result_cache import Store, digest
from .prompts import requests
from .survey import Asked, survey


def with_measured_heads(recipe: Recipe, on_progress: Listener) -> Recipe:
    """`recipe` with the heads that its word for `protect` means for the donor; `recipe` itself without a word.

    Where no run before has measured them, the donor, or the one that its chain began with, is read as a whole. Raises
    BudgetError where it has no such head, UnsupportedError as `with_same_heads`.
    """
    word = getattr(recipe.settings, "protect", None)
    if not isinstance(word, str):
        return recipe
    trust = recipe.trust_remote_code
    donor = open_donor(recipe.model, trust_remote_code=trust)
    plain = with_same_heads(donor, word, trust_remote_code=trust).reference
    store, key = Store(), _key(recipe, plain, word)
    heads = store.load(key)
    if heads is None:
        found = survey(plain, Asked((word,)), recipe.device, trust, on_progress)
        heads = found["protect"].get(word, {"from": word, "layers": []})
        with suppress(OutputError):  # the next run measures again
            store.save(key, heads)
    if not any(layer["heads"] for layer in heads["layers"]):
        raise BudgetError(f"protect {word}: no head of {plain} was found to do that; leave it out")
    return dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, protect=heads))


def _key(recipe: Recipe, plain: str, word: str) -> dict[str, Any]:
    """What the heads that are measured on `plain` depend on, beside the versions of libraries."""
    opened = open_model(plain, device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    return {
        "protect": word,
        "model": of_model(opened),
        "device": torch.device(opened.device).type,
        "prompts": digest(requests(None) if word == "safety" else []),
    }
