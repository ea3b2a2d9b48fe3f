"""Measures what each layer's cache is worth, by closed forms only, before a budget is divided over the layers.

One pass forward converts each layer at several budgets, which says how its error falls. One pass backward says how much
the change that one of these conversions makes behind its layer alters the model's predictions: with the gradient of the
log-probability of tokens drawn from the donor's own, half the second moment of gradient · change is the divergence of a
small change. Little text is enough for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

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
from .backward import back_through, gradients_of_samples
from .context import ConversionContext
from .sensitivity import measure_sensitivities
from .stored_sensitivities import Sensitivities

PROBE_BUDGET = 5 / 16  # one layer alone is converted at it, or at the nearest that the donor can express
LEAST_TOKENS = 4096  # of the calibration text that the statistics come from
# Positions whose changes count together. Errors of neighbours go together: all of a row would be exact on average, with
# many times the sampling error.
WINDOW, SAMPLES = 16, 4  # SAMPLES: tokens drawn at a position


@dataclass
class _Streams:
    """Hidden states of the survey's text, float32 on the CPU.

    Attributes:
        teacher: (N, L, D), rows for the statistics and then the evaluation rows, through the donor.
        eval_rows: on which each layer's conversion is measured.
        inputs: of each layer so far, the evaluation rows (eval_rows, L, D) before it.
        changes: what the conversion of that layer alone changes behind it.
    """

    teacher: Tensor
    eval_rows: int
    inputs: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)

    @property
    def fitted(self) -> int:
        """Rows for the statistics."""
        return len(self.teacher) - self.eval_rows


def measure_needs(context: ConversionContext, folder: Path | None = None) -> list[LayerNeed] | Sensitivities:
    """What the method's `share_out` wants to know of every layer, whatever the recipe's own budget.

    folder: a new one for what is too large for the memory; None: it is in memory all the same.
    """
    method = _at_any_budget(context.recipe, context.donor)
    if not method.surveys_sensitivity:
        return layer_needs(context, method)
    found = measure_sensitivities(context, folder)
    if method.survey_shares:
        found.set_costs(need.divergence for need in layer_needs(context, method))
    return found


def layer_needs(context: ConversionContext, method: Method) -> list[LayerNeed]:
    """The need of every layer, measured at those of the method's shares that the donor can express."""
    methods = _methods(context.recipe, context.donor, method.survey_shares)
    if not methods:  # layers of so few elements that there is nothing to divide
        return [LayerNeed((1.0,), (1.0,), 1.0, 0.0)] * context.layers
    probed = min(methods, key=lambda share: abs(share - PROBE_BUDGET))
    free = _unconstrained(context, method)
    streams = _embedded(context)
    context.donor.release()
    errors, total = [], 2 * context.layers
    for index in range(context.layers):
        context.on_progress(Progress("survey", index, total))
        errors.append(_survey_layer(context, index, methods, free, probed, streams))
    divergences: list[float] = []
    for divergence in _divergences(context, streams):
        context.on_progress(Progress("survey", context.layers + len(divergences), total))
        divergences.append(divergence)
    context.on_progress(Progress("survey", total, total))
    return [
        LayerNeed(tuple(by_share), tuple(by_share.values()), probed, divergence, tuple(freely.items()))
        for (by_share, freely), divergence in zip(errors, reversed(divergences), strict=True)
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


def statistics_tokens(hidden: int) -> int:
    """Tokens of the calibration text that a survey's statistics come from: second moments of so many elements."""
    return max(LEAST_TOKENS, 2 * hidden)


def _embedded(context: ConversionContext) -> _Streams:
    """The streams before the first layer: of the fit's text, its first rows and its last ones."""
    rows = context.rows.fit
    count, length = rows.shape
    eval_rows = calibration_rows.judging_rows(length, count)
    ids = rows[-eval_rows:, : calibration_rows.judged_tokens(context.recipe, context.donor.config)]
    wanted = statistics_tokens(context.donor.config.hidden_size) // length
    fitted = rows[: max(1, min(wanted, count - eval_rows)), : ids.shape[1]]
    return _Streams(context.donor.embed(torch.cat((fitted, ids))), len(ids))


def _survey_layer(
    context: ConversionContext,
    index: int,
    methods: dict[float, Method],
    free: dict[float, Method],
    probed: float,
    streams: _Streams,
) -> tuple[dict[float, float], dict[float, float]]:
    """The relative error of layer `index` by share, of `methods` and of `free`; all streams move behind the layer."""
    layer = layer_steps.read_layer(context, index, streams.teacher.shape[1])
    before = streams.teacher[streams.fitted :].clone()
    streams.inputs.append(before)
    targets = layer_steps.observe(context, layer, methods[probed], streams.teacher, streams.fitted)
    text = (targets.inputs, targets.targets, layer.position_embeddings)

    def output(method: Method) -> Tensor:
        return layer.attend(method.convert(targets.statistics, index, *text)[0], targets.held_inputs)

    errors, freely = {}, {}
    for share, method in methods.items():
        found = output(method)
        errors[share] = relative_error(found, targets.held_targets)
        if share == probed:
            changed = before.clone()
            layer.complete(changed, found)
            streams.changes.append(changed.sub_(streams.teacher[streams.fitted :]))
    for share, method in free.items():
        freely[share] = relative_error(output(method), targets.held_targets)
    return errors, freely


def _divergences(context: ConversionContext, streams: _Streams) -> Iterator[float]:
    """KL(donor ‖ donor with one layer converted) of each layer, as it is estimated, from the last to the first."""
    generator = torch.Generator().manual_seed(context.recipe.seed)
    behind = streams.teacher[streams.fitted :]
    gradients = torch.empty(SAMPLES, *behind.shape)
    step = calibration_rows.JUDGE_TOKENS  # of whose logits there are several copies
    for row, at_row in zip(behind, gradients.unbind(1), strict=True):
        for part, at_part in zip(row.split(step), at_row.split(step, dim=1), strict=True):
            with half_products(context.device):
                at_part.copy_(gradients_of_samples(context, part, generator, SAMPLES))
    context.donor.release()
    for index in reversed(range(context.layers)):
        yield divergence_of(streams.changes.pop(), gradients)
        if index:
            layer = layer_steps.read_layer(context, index, behind.shape[1])
            gradients = back_through(context, layer, streams.inputs.pop(), gradients)


def divergence_of(change: Tensor, gradients: Tensor) -> float:
    """The divergence of the predictions, nats per token, that a `change` of hidden states makes.

    Args:
        change: (N, L, D); gradients: (samples, N, L, D), of the log-probability of tokens drawn from the predictions.
    """
    products = torch.stack([(gradient * change).sum(-1) for gradient in gradients])
    windows = pad(products, (0, -products.shape[-1] % WINDOW)).unflatten(-1, (-1, WINDOW)).sum(-1)
    return 0.5 * float(windows.square().sum()) / products.numel()
