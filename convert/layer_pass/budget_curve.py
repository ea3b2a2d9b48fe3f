"""Several budgets from one pass: what each would give, measured, and no checkpoint written.

The donor's work is shared: each layer is read and observed once. Every budget has its own method and its own
student stream, and takes the steps of a conversion (`layer_steps`), so its figures are those of that conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mhconvert.device import pick_device
from mhconvert.errors import BudgetError, MhconvertError
from mhconvert.library_versions import versions
from mhconvert.progress import Listener, Progress, ignore

from ..calibration import calibration_rows
from ..checkpoint import provenance
from ..donor.donor import Donor, open_donor
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from . import conversion_report, cost_estimate, decoder_layer, layer_steps, survey
from .context import ConversionContext, Fit, Measure

BUDGETS = (0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125)

HeldOut = Callable[[Any, int], Tensor]  # tokenizer, tokens a row -> rows of ids (N, L)


@dataclass
class Student:
    """One budget's method and stream; the streams of all budgets share one teacher."""

    context: ConversionContext
    method: Method
    streams: decoder_layer.Streams
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def run(
    recipe: Recipe,
    budgets: Sequence[float] | None = None,
    *,
    fit: Fit,
    measure: Measure,
    held_out: HeldOut | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Fidelity and cache of the conversion that `recipe` describes, at each of `budgets` instead of its own (None: of
    BUDGETS those that the donor can have).

    fit, measure: as in `pipeline.run`. held_out: rows to measure on instead of the calibration text's own.
    Returns the donor's perplexity and KV sizes, the points from the largest budget down, and what was measured on.
    Raises MhconvertError; a budget that the donor cannot express is refused before any weight is read.
    """
    started, tell = time.perf_counter(), on_progress or ignore
    device = pick_device(recipe.device)
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    recipes = at_budgets(recipe, expressible(recipe, donor, BUDGETS) if budgets is None else budgets)
    for each in recipes:
        build_method(each.method, donor.config, each.settings, each.effort)
    calibration_rows.check(recipe, donor.config)
    dtype = cost_estimate.output_dtype(recipe, donor)
    measured_rows = held_out and held_out(
        donor.tokenizer(), calibration_rows.row_length(recipe, donor.config)
    )
    rows = calibration_rows.draw(recipe, donor, device, tell)
    if measured_rows is not None:
        rows = calibration_rows.Rows(rows.fit, measured_rows)
    context = ConversionContext(recipe, donor, device, dtype, rows, fit, measure, tell)
    needs = functools.cache(lambda: survey.run(context))
    result = trace(dataclasses.replace(context, needs=needs), recipes)
    tell(Progress("done", 1, 1))
    return {
        "method": recipe.method,
        "donor": recipe.model,
        "donor_name": donor.name,
        "effort": recipe.effort,
        "fit_steps": layer_steps.fit_steps(recipe),
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": conversion_report.calibration_facts(recipe, rows),
        **result,
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": provenance.peak_rss(),
    }


def expressible(recipe: Recipe, donor: Donor, budgets: Sequence[float]) -> list[float]:
    """Return those of `budgets` that the donor's geometry can express."""
    found = []
    for share in budgets:
        with suppress(BudgetError):
            build_method(recipe.method, donor.config, recipe.settings.at_budget(share), recipe.effort)
            found.append(share)
    return found


def at_budgets(recipe: Recipe, budgets: Sequence[float]) -> list[Recipe]:
    """Return the recipe at each budget, the largest first. Raises MhconvertError for none, or for explicit sizes."""
    if not budgets:
        raise MhconvertError("a curve needs at least one budget")
    if recipe.tolerance is not None:
        raise MhconvertError("a curve shows every budget; leave the tolerance out")
    return [recipe.at_budget(share) for share in sorted(set(budgets), reverse=True)]


def trace(context: ConversionContext, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Convert at all `recipes`, which differ in their budgets only, in one pass over the layers; a point for each."""
    donor, rows, dtype = context.donor, context.rows, context.dtype
    place, fitted = layer_steps.positions(donor, rows.fit.shape[1], context.device), len(rows.fit)
    contexts = [context.with_recipe(recipe) for recipe in recipes]
    methods = [each.planned_method() for each in contexts]
    teacher = donor.embed(rows.all)
    blocks = layer_steps.block_steps(recipes[0], *rows.fit.shape)
    begun = (teacher if blocks else teacher[fitted:]).to(dtype).float()
    students = [
        Student(each, method, decoder_layer.Streams(teacher, begun.clone(), fitted))
        for each, method in zip(contexts, methods, strict=True)
    ]
    context.on_progress(Progress("layers", 0, context.layers))
    for index in range(context.layers):
        _pass_layer(context, index, students, place)
        context.on_progress(Progress("layers", index + 1, context.layers))
    hidden = [student.streams.student_held for student in students]
    found = conversion_report.measured(context, teacher[fitted:], hidden)
    donor.release()
    elements = sum(layer["kv_elements"]["donor"] for layer in students[0].layers)
    return {
        "perplexity": found[0]["perplexity"]["donor"],
        "kv_elements_per_token": elements,
        "kv_bytes_per_token": elements * dtype.itemsize,
        "measured_tokens": rows.held_out.numel() - len(rows.held_out),  # the first of a row is not predicted
        "points": [_point(s, result, dtype) for s, result in zip(students, found, strict=True)],
    }


def _pass_layer(
    context: ConversionContext, index: int, students: list[Student], place: layer_steps.Positions
) -> None:
    """Move the teacher and every student past a layer."""
    layer, rotary = layer_steps.read(context.donor, index, place, context.device)
    shared = students[0].streams
    method, dtype = students[0].method, context.dtype
    seen = layer_steps.observe(layer, index, method, shared.teacher, shared.fitted, rotary, dtype)
    for student in students:
        begun = time.perf_counter()
        attention, _ = layer_steps.convert(student.context, student.method, index, seen)
        layer_steps.refine(student.context, layer, index, attention, student.streams)
        student.layers.append(layer_steps.follow(layer, index, attention, seen, student.streams.student))
        student.seconds += time.perf_counter() - begun


def _point(student: Student, found: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What one budget costs and keeps, named as in a conversion's report.

    seconds: of its own surgery and fit, without the work that is shared.
    """
    elements = sum(layer["kv_elements"]["converted"] for layer in student.layers)
    perplexity = found["perplexity"]
    return {
        "kv_budget": student.context.recipe.settings.kv_budget,
        "kv_elements_per_token": elements,
        "kv_bytes_per_token": elements * dtype.itemsize,
        "kl": found["kl"],
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["converted"] / perplexity["donor"],
        "top1_agreement": found["top1_agreement"],
        "mean_relative_error": sum(layer["relative_error"] for layer in student.layers) / len(student.layers),
        "seconds": student.seconds,
    }
