"""Measures what each layer's cache is worth, by closed forms only, before a budget is divided over the layers.

Each layer is converted at several budgets, which says how its error falls; and at one of them it alone replaces the
donor's, which says how much its error is heard at the model's output. Little text is enough for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhconvert.device import half_products
from mhconvert.errors import BudgetError
from mhconvert.progress import Progress

from ..attention.linalg import relative_error
from ..calibration import calibration_rows
from ..donor.donor import Donor
from ..methods.budget_division import LayerNeed
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from . import layer_steps
from .context import ConversionContext

PROBED = 5 / 16  # where a layer is heard, or at the nearest of them that the donor can express
TOKENS = 8192  # of the calibration text that the statistics come from
STRIDE = 4  # one position in so many is compared at the output


def run(context: ConversionContext) -> list[LayerNeed]:
    """Return the need of every layer, which does not depend on the recipe's own budget."""
    recipe, donor, device, rows = context.recipe, context.donor, context.device, context.rows
    total, tell = context.layers, context.on_progress
    methods = _methods(recipe, donor)
    if not methods:  # layers of so few elements that there is nothing to divide
        return [LayerNeed((1.0,), (1.0,), 1.0, 0.0)] * total
    probed = min(methods, key=lambda share: abs(share - PROBED))
    judges = calibration_rows.judging_rows(rows.fit.shape[1], len(rows.fit))
    seen = rows.fit[: max(1, min(TOKENS // rows.fit.shape[1], len(rows.fit) - judges))]
    ids = rows.fit[-judges:, : calibration_rows.JUDGE_TOKENS]
    seen = seen[:, : ids.shape[1]]
    place, fitted = layer_steps.positions(donor, ids.shape[1], device), len(seen)
    teacher = donor.embed(torch.cat((seen, ids)))
    heard = teacher[:0].clone()  # of each layer so far, the judging rows behind it alone converted
    errors: list[dict[float, float]] = []
    for index in range(total):
        tell(Progress("survey", index, total))
        layer, rotary = layer_steps.read(donor, index, place, device)
        donor_attention, before = layer.attention, teacher[fitted:].clone()
        if len(heard):
            with half_products(device):
                layer.complete(heard, layer.attend(donor_attention, layer.attention_inputs(heard)))
        found = layer_steps.observe(layer, index, methods[probed], teacher, fitted, rotary, context.dtype)
        errors.append({})
        for share, method in methods.items():
            text = (found.inputs, found.targets, rotary.embeddings)
            attention, _ = method.convert(found.statistics, index, *text)
            output = layer.attend(attention, found.held_inputs)
            errors[-1][share] = relative_error(output, found.held_targets)
            if share == probed:
                layer.complete(before, output)
        heard = torch.cat((heard, before))
    divergences = _divergences(context, teacher[fitted:], heard.split(judges), ids)
    donor.release()
    tell(Progress("survey", total, total))
    return [
        LayerNeed(tuple(found), tuple(found.values()), probed, divergence)
        for found, divergence in zip(errors, divergences, strict=True)
    ]


def _methods(recipe: Recipe, donor: Donor) -> dict[float, Method]:
    """Return the method at each share that the donor can express."""
    found = {}
    for share in build_method(recipe.method, donor.config, recipe.settings, recipe.effort).survey_shares:
        try:
            settings = recipe.settings.at_budget(share)
            found[share] = build_method(recipe.method, donor.config, settings, "survey")
        except BudgetError:
            continue
    return found


@torch.inference_mode()
def _divergences(
    context: ConversionContext, teacher: Tensor, heard: tuple[Tensor, ...], ids: Tensor
) -> list[float]:
    """KL(donor ‖ donor with one layer converted) of each layer, from the hidden states behind the last."""
    donor, device = context.donor, context.device
    predictions = [context.measure() for _ in heard]
    following = ids[:, 1::STRIDE]
    positions = torch.arange(following.shape[1]) * STRIDE
    for row, targets in enumerate(following):
        expected = donor.head(teacher[row, positions].to(device)).cpu()
        for states, found in zip(heard, predictions, strict=True):
            found.add(expected, donor.head(states[row, positions].to(device)).cpu(), targets)
    return [found.result()["kl"] for found in predictions]
