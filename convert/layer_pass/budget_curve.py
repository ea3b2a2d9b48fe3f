"""Several budgets from one pass: what each conversion would give, measured; no checkpoint is written.

The donor's work is shared: each layer is read and observed once. Every budget has its own method and its own
student stream, and takes the steps of a conversion (`layer_steps`), so its figures are those of that conversion.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mhconvert.device import pick_device
from mhconvert.errors import BudgetError, MhconvertError
from mhconvert.library_versions import versions
from mhconvert.progress import Listener, Progress, ignore

from ..bare_process.child import peak_memory
from ..calibration import calibration_rows
from ..calibration.token_rows import require_embedded
from ..checkpoint import chain
from ..donor.donor import Donor, open_donor
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from . import conversion_report, cost_estimate, layer_steps, survey
from .context import Complete, ConversionContext, Fit, Measure, as_it_is
from .decoder_layer import Streams

BUDGETS = (0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125)

HeldOut = Callable[[Any, int], Tensor]  # tokenizer, tokens a row -> rows of ids (N, L)


@dataclass
class Student:
    """One budget's conversion on its way through the layers; the teacher's stream is the same for all budgets."""

    context: ConversionContext
    method: Method
    streams: Streams
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def measure_curve(
    recipe: Recipe,
    budgets: Sequence[float] | None = None,
    *,
    fit: Fit,
    measure: Measure,
    complete: Complete = as_it_is,
    held_out: HeldOut | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Fidelity and cache of the conversion that `recipe` describes at each of `budgets` instead of its own.

    Args:
        recipe: of the conversion.
        budgets: shares of the donor's cache; None: of BUDGETS those that the donor can have.
        fit, measure, complete: as in `pipeline.convert_checkpoint`.
        held_out: rows to measure on, instead of the calibration text's own.

    Returns:
        The donor's perplexity and KV sizes, the points from the largest budget down, what was measured on, and
        same_size: [{kv_budget, as}] for budgets without a point, which come to the size of a smaller one.

    Raises:
        MhconvertError: A budget that the donor cannot express is refused before any weight is read.
    """
    started, on_progress = time.perf_counter(), on_progress or ignore
    device = pick_device(recipe.device)
    donor, recipes, same_size = _resolve(recipe, budgets, on_progress)
    if (measured := complete(recipe, on_progress)) is not recipe:
        donor, recipes, same_size = _resolve(recipe := measured, budgets, on_progress)
    dtype = cost_estimate.output_dtype(recipe, donor)
    rows = _rows(recipe, donor, device, held_out, on_progress)
    context = ConversionContext(recipe, donor, device, dtype, rows, fit, measure, on_progress)
    needs = functools.cache(lambda: survey.measure_needs(context))
    points = trace(replace(context, needs=needs), recipes)
    on_progress(Progress("done", 1, 1))
    return {
        "method": recipe.method,
        "donor": recipe.model,
        "donor_name": donor.name,
        "effort": recipe.effort,
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": conversion_report.calibration_facts(context),
        **points,
        "same_size": same_size,
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_memory(),
    }


def _resolve(
    recipe: Recipe, budgets: Sequence[float] | None, on_progress: Listener
) -> tuple[Donor, list[Recipe], list[dict[str, float]]]:
    """The donor, the recipe at each budget of a size of its own, the largest first, and the other budgets.

    Every refusal that needs no weights happens here.
    """
    if recipe.methods:
        raise MhconvertError(
            "a curve is of one conversion, not of a chain: convert by its first methods, and draw it of their result"
        )
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=on_progress)
    chain.require_donor(donor.folder, recipe)
    on_progress(Progress("donor", 1, 1, donor.notice or donor.name))
    recipes = at_budgets(recipe, expressible(recipe, donor, BUDGETS) if budgets is None else budgets)
    by_size: dict[int, list[float]] = {}
    for each in recipes:
        by_size.setdefault(planned_elements(each, donor), []).append(each.settings.kv_budget)
    smallest = build_method(recipe.method, donor.config, recipes[-1].settings, recipe.effort)
    calibration_rows.check(recipe, donor.config, smallest.least_row)
    same_size = [{"kv_budget": share, "as": least} for *more, least in by_size.values() for share in more]
    return donor, at_budgets(recipe, [shares[-1] for shares in by_size.values()]), same_size


def planned_elements(recipe: Recipe, donor: Donor) -> int:
    """Cache elements a token of the conversion that `recipe` describes. Raises BudgetError where there is none."""
    return build_method(recipe.method, donor.config, recipe.settings, recipe.effort).kv_elements()


def _rows(
    recipe: Recipe, donor: Donor, device: torch.device, held_out: HeldOut | None, on_progress: Listener
) -> calibration_rows.Rows:
    """The calibration rows, with those that `held_out` gives to measure on instead of their own."""
    length = calibration_rows.row_length(recipe, donor.config)
    measured = (
        held_out(donor.tokenizer(), length) if held_out else None
    )  # a text too short is refused before drawing
    if measured is not None:
        require_embedded(measured, donor.tokenizer(), donor.config.vocab_size)
    rows = calibration_rows.draw(recipe, donor, device, on_progress)
    return rows if measured is None else calibration_rows.Rows(rows.fit, measured)


def expressible(recipe: Recipe, donor: Donor, budgets: Sequence[float]) -> list[float]:
    """Those of `budgets` that the donor can have."""
    possible = []
    for share in budgets:
        with suppress(BudgetError):
            planned_elements(recipe.at_budget(share), donor)
            possible.append(share)
    return possible


def at_budgets(recipe: Recipe, budgets: Sequence[float]) -> list[Recipe]:
    """Return the recipe at each budget, the largest first. Raises MhconvertError for none, or for explicit sizes."""
    if not budgets:
        raise MhconvertError("a curve needs at least one budget")
    if recipe.tolerance is not None:
        raise MhconvertError("a curve shows every budget; leave the tolerance out")
    return [recipe.at_budget(share) for share in sorted(set(budgets), reverse=True)]


def trace(context: ConversionContext, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """One pass over the layers for all `recipes`, which differ in their budgets alone; a point for each."""
    donor, rows, total = context.donor, context.rows, context.layers
    contexts = [context.with_recipe(recipe) for recipe in recipes]
    methods = [each.planned_method() for each in contexts]
    teacher, fitted = layer_steps.teacher_start(context, methods[0])
    students = [
        Student(each, method, Streams(teacher, layer_steps.student_start(each, fitted), fitted))
        for each, method in zip(contexts, methods, strict=True)
    ]
    context.on_progress(Progress("layers", 0, total))
    for index in range(total):
        _pass_layer(context, index, students)
        context.on_progress(Progress("layers", index + 1, total))
    hidden = [student.streams.student_held for student in students]
    results = conversion_report.held_out_fidelity(context, teacher[fitted:], hidden)
    donor.release()
    elements = _elements(students[0], "donor")
    return {
        "perplexity": results[0]["perplexity"]["donor"],
        "kv_elements_per_token": elements,
        "kv_bytes_per_token": elements * context.dtype.itemsize,
        "cache_context": layer_steps.stated_context(methods[0], donor),
        "fit_steps": layer_steps.layer_fit_steps(context.recipe, methods[0], rows.fit.shape[1]),
        "measured_tokens": rows.held_out.numel() - len(rows.held_out),  # the first of a row is not predicted
        "points": [_point(student, result) for student, result in zip(students, results, strict=True)],
    }


def _pass_layer(context: ConversionContext, index: int, students: list[Student]) -> None:
    """Move the teacher and every student past layer `index`."""
    layer = layer_steps.read_layer(context, index, context.rows.fit.shape[1])
    shared = students[0].streams
    targets = layer_steps.observe(context, layer, students[0].method, shared.teacher, shared.fitted)
    for student in students:
        begun = time.perf_counter()
        attention, chosen = layer_steps.convert_attention(student.context, layer, student.method, targets)
        layer_steps.refit_block(student.context, layer, attention, student.streams)
        measured = layer_steps.advance_student(layer, attention, targets, student.streams.student)
        student.layers.append(chosen | measured)
        student.seconds += time.perf_counter() - begun


def _elements(student: Student, side: str) -> float:
    context = layer_steps.stated_context(student.method, student.context.donor)
    return conversion_report.counted(student.layers, side, context)


def _point(student: Student, result: dict[str, Any]) -> dict[str, Any]:
    """What one budget costs and keeps, named as in a conversion's report.

    `seconds` are those of its own surgery and fit, without the work that all budgets share.
    """
    elements = _elements(student, "converted")
    perplexity = result["perplexity"]
    return {
        "kv_budget": student.context.recipe.settings.kv_budget,
        "kv_elements_per_token": elements,
        "kv_bytes_per_token": elements * student.context.dtype.itemsize,
        "kl": result["kl"],
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["converted"] / perplexity["donor"],
        "top1_agreement": result["top1_agreement"],
        "mean_relative_error": sum(layer["relative_error"] for layer in student.layers) / len(student.layers),
        "seconds": student.seconds,
    }
