"""Measures what each layer's cache is worth, by closed forms only, before a budget is divided over the layers.

Each layer is converted at several budgets, which says how its error falls; and at one of them it alone replaces the
donor's, which says how much its error changes the model's predictions. Little text is enough for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mhconvert.device import half_products
from mhconvert.errors import BudgetError
from mhconvert.progress import Progress

from ..attention.linalg import relative_error
from ..calibration import calibration_rows
from ..donor.donor import Donor
from ..methods.budget_division import LayerNeed
from ..methods.layer_sensitivity import LayerSensitivity
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from . import layer_steps
from .context import ConversionContext
from .sensitivity import measure_sensitivities

PROBE_BUDGET = 5 / 16  # one layer alone is converted at it, or at the nearest that the donor can express
TOKENS = 8192  # of the calibration text that the statistics come from
STRIDE = 4  # one position in so many is compared at the output


@dataclass
class _Streams:
    """Hidden states of the survey's text, float32 on the CPU.

    Attributes:
        ids: (eval_rows, L), the rows on which each layer's conversion is measured.
        teacher: (N, L, D), rows for the statistics and then the evaluation rows, through the donor.
        hidden_with_layer_converted: for each layer so far the evaluation rows, through the donor with that layer alone
            converted.
    """

    ids: Tensor
    teacher: Tensor
    hidden_with_layer_converted: list[Tensor] = field(default_factory=list)

    @property
    def fitted(self) -> int:
        """Rows for the statistics."""
        return len(self.teacher) - len(self.ids)


def measure_needs(context: ConversionContext) -> list[LayerNeed] | list[LayerSensitivity]:
    """What the method's `share_out` wants to know of every layer, whatever the recipe's own budget."""
    method = _at_any_budget(context.recipe, context.donor)
    if method.surveys_sensitivity:
        return measure_sensitivities(context)
    return _layer_needs(context, method)


def _layer_needs(context: ConversionContext, method: Method) -> list[LayerNeed]:
    """The need of every layer, measured at those of the method's shares that the donor can express."""
    methods = _methods(context.recipe, context.donor, method.survey_shares)
    if not methods:  # layers of so few elements that there is nothing to divide
        return [LayerNeed((1.0,), (1.0,), 1.0, 0.0)] * context.layers
    probed = min(methods, key=lambda share: abs(share - PROBE_BUDGET))
    free = _unconstrained(context, method)
    streams = _embedded(context)
    errors = []
    for index in range(context.layers):
        context.on_progress(Progress("survey", index, context.layers))
        errors.append(_survey_layer(context, index, methods, free, probed, streams))
    divergences = _divergences(context, streams)
    context.donor.release()
    context.on_progress(Progress("survey", context.layers, context.layers))
    return [
        LayerNeed(tuple(by_share), tuple(by_share.values()), probed, divergence, tuple(freely.items()))
        for (by_share, freely), divergence in zip(errors, divergences, strict=True)
    ]


def _at_any_budget(recipe: Recipe, donor: Donor) -> Method:
    """The method at the recipe's budget, or at the whole one where the donor cannot have that: both survey alike."""
    try:
        return build_method(recipe.method, donor.config, recipe.settings, recipe.effort)
    except BudgetError:
        return build_method(recipe.method, donor.config, recipe.settings.at_budget(1.0), recipe.effort)


def _methods(recipe: Recipe, donor: Donor, shares: Sequence[float]) -> dict[float, Method]:
    """By share of the donor's cache; shares that the donor cannot express are missing."""
    methods = {}
    for share in shares:
        try:
            settings = recipe.settings.at_budget(share)
            methods[share] = build_method(recipe.method, donor.config, settings, "survey")
        except BudgetError:
            continue
    return methods


def _unconstrained(context: ConversionContext, method: Method) -> dict[float, Method]:
    """As `_methods`, without the method's constraint; empty where it has none."""
    if method.unconstrained is None:
        return {}
    recipe = replace(context.recipe, settings=method.unconstrained)
    return _methods(recipe, context.donor, _at_any_budget(recipe, context.donor).survey_shares)


def _embedded(context: ConversionContext) -> _Streams:
    """The streams before the first layer: of the fit's text, its first rows and its last ones."""
    rows = context.rows.fit
    count, length = rows.shape
    eval_rows = calibration_rows.judging_rows(length, count)
    ids = rows[-eval_rows:, : calibration_rows.JUDGE_TOKENS]
    fitted = rows[: max(1, min(TOKENS // length, count - eval_rows)), : ids.shape[1]]
    return _Streams(ids, context.donor.embed(torch.cat((fitted, ids))))


def _survey_layer(
    context: ConversionContext,
    index: int,
    methods: dict[float, Method],
    free: dict[float, Method],
    probed: float,
    streams: _Streams,
) -> tuple[dict[float, float], dict[float, float]]:
    """The relative error of layer `index` by share, of `methods` and of `free`; all streams move behind the layer."""
    layer = layer_steps.read_layer(context, index, streams.ids.shape[1])
    before = streams.teacher[streams.fitted :].clone()
    if streams.hidden_with_layer_converted:
        earlier = torch.cat(streams.hidden_with_layer_converted)
        with half_products(context.device):
            layer.complete(earlier, layer.attend(layer.attention, layer.attention_inputs(earlier)))
        streams.hidden_with_layer_converted = list(earlier.split(len(before)))
    targets = layer_steps.observe(context, layer, methods[probed], streams.teacher, streams.fitted)
    text = (targets.inputs, targets.targets, layer.position_embeddings)

    def output(method: Method) -> Tensor:
        return layer.attend(method.convert(targets.statistics, index, *text)[0], targets.held_inputs)

    errors, freely = {}, {}
    for share, method in methods.items():
        found = output(method)
        errors[share] = relative_error(found, targets.held_targets)
        if share == probed:
            layer.complete(before, found)
    for share, method in free.items():
        freely[share] = relative_error(output(method), targets.held_targets)
    streams.hidden_with_layer_converted.append(before)
    return errors, freely


@torch.inference_mode()
def _divergences(context: ConversionContext, streams: _Streams) -> list[float]:
    """KL(donor ‖ donor with one layer converted) of each layer, from the hidden states behind the last."""
    donor, predictions = context.donor, [context.measure() for _ in streams.hidden_with_layer_converted]
    teacher = streams.teacher[streams.fitted :]
    following = streams.ids[:, 1::STRIDE]
    positions = torch.arange(following.shape[1]) * STRIDE
    for row, targets in enumerate(following):
        expected = donor.head(teacher[row, positions].to(context.device)).cpu()
        for hidden, prediction in zip(streams.hidden_with_layer_converted, predictions, strict=True):
            logits = donor.head(hidden[row, positions].to(context.device)).cpu()
            prediction.add(expected, logits, targets)
    return [prediction.result()["kl"] for prediction in predictions]
