"""The pass: one decoder layer at a time from a donor to a converted checkpoint.

    resolve ▸ plan ▸ for each layer: read ▸ observe ▸ convert ▸ fit ▸ check ▸ write ▸ finish

A survey of the layers comes before the plan where they may differ in size (`survey`); a tolerance instead of a budget
puts a search before the layers, and repeats them where the result misses it (`tolerance_search`); where it is on text
that the result writes, each result is written whole and loaded from OUT.partial (`generation_search`).
Two streams of hidden states are all that passes from layer to layer: the donor's own (the teacher) and the converted
model's (the student). Everything is written to OUT.partial, which is renamed to OUT when it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mhconvert.device import pick_device
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress, StageClock, ignore

from .bare_process.reload import peak_rss
from .calibration import calibration_rows
from .checkpoint import chain, provenance
from .donor.donor import Donor, open_donor
from .layer_pass import (
    conversion_report,
    cost_estimate,
    first_donor,
    layer_steps,
    survey,
    time_estimate,
    whole_model,
)
from .layer_pass.context import Complete, ConversionContext, Fit, Measure, Writing, as_it_is, unwritten
from .layer_pass.decoder_layer import Streams
from .layer_pass.kind_survey import surveyed_plan
from .layer_pass.resumable_run import Workspace
from .layer_pass.tolerance_search import convert_within_tolerance, least_row
from .methods.registry import Method, build_method
from .recipe.recipe import Recipe
from .recipe.tolerance import on_policy
from .storage import output_folder
from .storage.byte_size import byte_size
from .storage.dtype_cast import cast

Finish = Callable[[Path, dict[str, Any]], None]


def convert_checkpoint(
    recipe: Recipe,
    *,
    fit: Fit,
    measure: Measure,
    finish: Finish,
    complete: Complete = as_it_is,
    writing: Writing = unwritten,
    step: Path | None = None,
    chained: Callable[[Recipe], Recipe] = lambda own: own,
    resume: bool = False,
    force: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; returns its report.

    Args:
        fit, measure: `heal.layer_fit.fit`, which trains a converted attention in place; `eval.fidelity.Fidelity`.
        finish: writes report and card into the folder (`eval.report.model_card.write_report`).
        complete: measures what the recipe leaves to be measured, behind the refusals that need no weights.
        writing: measures the text that a converted model writes (`eval.writing.on_policy.measure`).
        step, chained: a folder to write instead, marked as a step; of this pass's recipe that of all passes up to it.
        resume, force: continue an interrupted run of the same recipe; replace an existing output folder.

    Raises:
        MhconvertError: What a user can correct; the output folder then does not exist or is as it was.
    """
    started, on_progress = time.perf_counter(), StageClock(on_progress or ignore)
    device, fit = pick_device(recipe.device), on_progress.timed("layers: fit", fit)
    donor, method = _resolve(recipe, on_progress)
    first, read = first_donor.first_donor(donor, trust_remote_code=recipe.trust_remote_code)
    output_folder.check_free(output := step or recipe.output_folder(donor.name), force, *read)
    recipe, method = _completed(recipe, method, complete, on_progress)
    donor.open_weights(on_progress)
    needed = cost_estimate.plan(recipe, donor, method, device)["disk_needed_bytes"]
    with Workspace(output, chained(recipe), donor.place, needed, resume=resume, force=force) as space:
        rows = space.rows(lambda: calibration_rows.draw(recipe, donor, device, on_progress))
        dtype = cost_estimate.output_dtype(recipe, donor)
        unplanned = ConversionContext(recipe, donor, device, dtype, rows, fit, measure, on_progress)
        needs = partial(space.needs, partial(survey.measure_needs, unplanned))
        context = replace(unplanned, needs=needs, chain_began=first_donor.with_weights(donor, first))
        report = _convert_within_budget(context, space, writing)
        whole_model.verify(context, space, report)
        report |= {"output": str(output), "seconds": time.perf_counter() - started + space.earlier_seconds}
        report |= {"peak_rss_bytes": peak_rss(report), "stage_seconds": on_progress.stop()}  # of this run
        finish(space.partial, report)
        provenance.write_provenance(space.partial, context.first, report)
        space.publish(finished=step is None)
    on_progress(Progress("done", 1, 1, str(output)))
    return report


def _resolve(recipe: Recipe, on_progress: Listener) -> tuple[Donor, Method]:
    """The donor and the method for it (at the whole budget where the budget is searched).

    Every refusal that needs no weights happens here.
    """
    byte_size(recipe.max_shard_size)
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=on_progress)
    chain.require_donor(donor.folder, recipe)
    on_progress(Progress("donor", 1, 1, donor.notice or donor.name))
    donor.check_files()
    largest = recipe if recipe.tolerance is None else recipe.at_budget(1.0)
    method = build_method(recipe.method, donor.config, largest.settings, recipe.effort)
    calibration_rows.check(recipe, donor.config, least_row(recipe, donor, method))
    if isinstance(word := getattr(recipe.settings, "protect", None), str):
        first_donor.with_same_heads(donor, word, trust_remote_code=recipe.trust_remote_code)
    dtype = cost_estimate.output_dtype(recipe, donor)
    twin = build_method(recipe.method, donor.config, largest.settings, recipe.effort)  # an example changes it
    if method.notice and recipe.tolerance is None:
        on_progress(Progress("donor", 1, 1, method.notice))
    provenance.try_config(twin.example_config(), twin.model_class, donor, dtype)
    return donor, method


def _completed(
    recipe: Recipe, method: Method, complete: Complete, on_progress: Listener
) -> tuple[Recipe, Method]:
    """The recipe behind `complete`, and the method for it. Raises BudgetError where what was measured has no room."""
    measured = complete(recipe, on_progress)
    return (recipe, method) if measured is recipe else (measured, _resolve(measured, on_progress)[1])


def _convert_within_budget(context: ConversionContext, space: Workspace, writing: Writing) -> dict[str, Any]:
    """Convert every layer at the recipe's budget, or at the one that its tolerance asks for, and write the model."""
    tolerance, convert = context.recipe.tolerance, partial(_convert_layers, space=space)
    if tolerance is not None and on_policy(tolerance):
        write = partial(_convert_and_write, space=space, writing=writing)
        return convert_within_tolerance(context, space, write)[1]
    searched = tolerance is not None
    method, report = convert_within_tolerance(context, space, convert) if searched else convert(context)
    whole_model.write(context, method, space)
    return report


def _convert_and_write(
    context: ConversionContext, space: Workspace, writing: Writing
) -> tuple[Method, dict[str, Any]]:
    """As `_convert_layers`; the model is written, and the report has on_policy: what `writing` says of its texts."""
    method, report = _convert_layers(context, space)
    whole_model.write(context, method, space)
    return method, report | {"on_policy": whole_model.measure_texts(context, space, writing)}


def _convert_layers(context: ConversionContext, space: Workspace) -> tuple[Method, dict[str, Any]]:
    """Convert and write every layer, from the first that is not finished; returns the method and the report."""
    method = context.planned_method()
    if method.divisible and method.notice and context.recipe.tolerance is None:
        context.on_progress(Progress("survey", context.layers, context.layers, method.notice))
    total, length = context.layers, context.rows.fit.shape[1]
    for index, chosen in enumerate(space.layers):
        method.restore(index, chosen)
    if not space.streams_ready:
        _begin(context, method, space)
    context.on_progress(Progress("layers", len(space.layers), total))
    for index in range(len(space.layers), total):
        begun, streams = time.perf_counter(), space.streams
        layer = layer_steps.read_layer(context, index, length)
        targets = layer_steps.observe(context, layer, method, streams.teacher, streams.fitted)
        attention, chosen = layer_steps.convert_attention(context, layer, method, targets)
        layer_steps.refit_block(context, layer, attention, streams)
        measured = layer_steps.advance_student(layer, attention, targets, streams.student)
        chosen |= measured | {"index": index, "seconds": time.perf_counter() - begun}
        tensors = whole_model.layer_tensors(context, method, index, attention)
        space.finish_layer(tensors, chosen, last=index + 1 == total)
        context.on_progress(Progress("layers", index + 1, total, error=measured["relative_error"]))
    return method, _measured_report(context, method, space)


def _begin(context: ConversionContext, method: Method, space: Workspace) -> None:
    """Both streams before the first layer; the tensors outside the layers are written."""
    donor, dtype = context.donor, context.dtype
    teacher, fitted = layer_steps.teacher_start(context, method)
    streams = Streams(teacher, layer_steps.student_start(context, fitted), fitted)
    outer = ((name, cast(name, donor.source.read(name), dtype)) for name in donor.outer_tensor_names())
    space.begin(streams, outer, tensors=len(donor.shapes()) + method.added_tensors * context.layers)


def _measured_report(context: ConversionContext, method: Method, space: Workspace) -> dict[str, Any]:
    """What was chosen for the layers, and the fidelity of the whole on the held-out rows."""
    sizes = cost_estimate.plan(context.recipe, context.donor, method, context.device)
    facts = conversion_report.conversion_facts(context, space.layers, sizes, method.model_class)
    teacher, student = first_donor.teacher(context, space.streams.teacher_held), space.streams.student_held
    fidelity = conversion_report.held_out_fidelity(context, teacher, [student], space.probe)
    return first_donor.named(facts, context, method) | fidelity[0]


def plan(
    recipe: Recipe,
    *,
    surveyed: Measure | None = None,
    complete: Complete = as_it_is,
    timed: bool = True,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """What `convert_checkpoint` would do: sizes, KV arithmetic, disk, memory, time. Reads no weights, writes nothing.

    With a tolerance sizes are the most that they can come to, and layers and time are missing; time with healing too.

    Args:
        surveyed: `measure` as in `convert_checkpoint`; weights are read to know each layer's part of the budget.
        complete: as in `convert_checkpoint`.
        timed: whether half a second is spent on the time that it would take.
    """
    device, on_progress = pick_device(recipe.device), on_progress or ignore
    donor, method = _resolve(recipe, on_progress)
    output_folder.check_free(recipe.output_folder(donor.name), True, donor.folder)
    if surveyed is not None:
        _require_parts(recipe, method)
        recipe, method = _completed(recipe, method, complete, on_progress)
        _require_parts(recipe, method)
        rows = calibration_rows.draw(recipe, donor, device, on_progress)
        inputs = recipe, donor, device, cost_estimate.output_dtype(recipe, donor), rows
        sizes = surveyed_plan(ConversionContext(*inputs, _no_fit, surveyed, on_progress), method)
    else:
        sizes = cost_estimate.plan(recipe, donor, method, device)
    if recipe.tolerance is not None:
        return sizes | {"tolerance": recipe.tolerance, "layers": []}
    if recipe.heal is not None or not timed:
        return sizes
    rates = time_estimate.probe(device)
    return sizes | {"expected_seconds": time_estimate.expected_seconds(recipe, donor, method, device, rates)}


def _require_parts(recipe: Recipe, method: Method) -> None:
    """Raises MhconvertError where a survey would divide no budget."""
    if recipe.tolerance is not None or not method.divisible:
        raise MhconvertError(
            "there is nothing to survey: no budget that layers would have parts of; leave it out"
        )


def _no_fit(*_: Any, **__: Any) -> None:
    """A survey uses closed forms alone."""
