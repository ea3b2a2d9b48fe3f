"""The pass: one decoder layer at a time from a donor to a converted checkpoint.

    resolve ▸ survey ▸ plan ▸ for each layer: read ▸ observe ▸ convert ▸ fit ▸ check ▸ write ▸ finish ▸ verify

The survey is short, and left out where layers cannot differ in size.
A tolerance instead of a budget puts a search before the layers (`tolerance_search`), and repeats them where it misses.
Two streams of hidden states are all that passes from layer to layer: the donor's own (the teacher) and the
converted model's (the student). Everything is written to OUT.partial, which is renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhconvert.device import pick_device
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress, ignore

from .attention.rotary import LayerRotary
from .calibration import calibration_rows
from .checkpoint import provenance
from .donor.donor import Donor, open_donor
from .layer_pass import conversion_report, cost_estimate, decoder_layer, layer_steps, survey
from .layer_pass.context import ConversionContext, Fit, Measure
from .layer_pass.resumable_run import Workspace
from .layer_pass.tolerance_search import meet
from .methods.registry import Method, build_method
from .recipe.recipe import Recipe
from .storage import output_folder
from .storage.byte_size import byte_size
from .storage.dtype_cast import cast


def plan(
    recipe: Recipe,
    *,
    surveyed: Callable[[], Any] | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """What `run` would do: sizes, KV arithmetic, disk and memory. Reads no weights, writes nothing.

    With a tolerance the budget is searched: sizes are the most that it can come to, and layers are missing.
    surveyed: `measure` as in `run`; the weights are read for a survey, and each layer's part of the budget is known.
    """
    device, tell = pick_device(recipe.device), on_progress or ignore
    donor, method = _open(recipe, tell)
    output_folder.check_free(recipe.output_folder(donor.name), True, donor.folder)
    if surveyed is not None:
        if recipe.tolerance is not None or not method.divisible:
            raise MhconvertError(
                "there is nothing to survey: no budget that layers would have parts of; leave it out"
            )
        rows = calibration_rows.draw(recipe, donor, device, tell)
        dtype = cost_estimate.output_dtype(recipe, donor)
        context = ConversionContext(recipe, donor, device, dtype, rows, _no_fit, surveyed, tell)
        method.share_out(survey.run(context))
    sizes = cost_estimate.plan(recipe, donor, method, device)
    return sizes if recipe.tolerance is None else sizes | {"tolerance": recipe.tolerance, "layers": []}


def run(
    recipe: Recipe,
    *,
    fit: Fit,
    measure: Measure,
    finish: Callable[[Path, dict[str, Any]], None],
    resume: bool = False,
    force: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; returns its report.

    fit: trains a converted attention in place (`heal.layer_fit.fit`). measure: makes an accumulator of predictions
    (`eval.fidelity.Fidelity`). finish: writes the report into the folder (`eval.report.model_card.write_report`).
    Raises MhconvertError for what a user can mend; the output folder then does not exist or is as it was.
    """
    started, tell = time.perf_counter(), on_progress or ignore
    device = pick_device(recipe.device)
    donor, method = _open(recipe, tell)
    output, dtype = recipe.output_folder(donor.name), cost_estimate.output_dtype(recipe, donor)
    output_folder.check_free(output, force, donor.folder)
    _ = donor.source  # downloads, and checks every name and shape
    sizes = cost_estimate.plan(recipe, donor, method, device)
    space = Workspace(output, recipe, sizes["disk_needed_bytes"], resume=resume, force=force)
    with space:
        rows = space.rows(lambda: calibration_rows.draw(recipe, donor, device, tell))
        surveying = ConversionContext(recipe, donor, device, dtype, rows, fit, measure, tell)
        needs = functools.partial(space.needs, functools.partial(survey.run, surveying))
        context = dataclasses.replace(surveying, needs=needs)
        attempt = functools.partial(_attempt, space=space)
        if recipe.tolerance is None:
            method, report = attempt(context)
        else:
            context, method, report = meet(context, space, attempt)
        report["output"] = str(output)
        space.release_streams()
        donor.release()
        space.finish_tensors()
        provenance.write_config(space.partial, method, donor, dtype)
        tell(Progress("verify", 0, 1))
        if recipe.verify:
            conversion_report.add_reload(report, space)
        report["seconds"] = time.perf_counter() - started + space.earlier_seconds
        report["peak_rss_bytes"] = max(
            provenance.peak_rss(), report.get("verified", {}).get("peak_rss_bytes", 0)
        )
        finish(space.partial, report)
        provenance.write_provenance(space.partial, context.recipe, donor, report)
        space.publish()
    tell(Progress("done", 1, 1, str(output)))
    return report


def _no_fit(*_: Any, **__: Any) -> None:
    raise AssertionError("a survey fits nothing")


def _open(recipe: Recipe, tell: Listener) -> tuple[Donor, Method]:
    """The donor and the method for it (at the whole budget where it is searched).

    Every refusal that needs no weights happens here.
    """
    byte_size(recipe.max_shard_size)
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    largest = recipe if recipe.tolerance is None else recipe.at_budget(1.0)
    method = build_method(recipe.method, donor.config, largest.settings, recipe.effort)
    calibration_rows.check(recipe, donor.config)
    cost_estimate.output_dtype(recipe, donor)
    return donor, method


def _attempt(context: ConversionContext, space: Workspace) -> tuple[Method, dict[str, Any]]:
    """Convert every layer into `space`, and measure the result on the held-out rows."""
    method = context.planned_method()
    layers = _convert_layers(context, method, space)
    sizes = cost_estimate.plan(context.recipe, context.donor, method, context.device)
    remote = provenance.needs_remote_code(method.model_class)
    report = conversion_report.known_facts(context, layers, sizes, remote)
    streams = space.streams
    [measured] = conversion_report.measured(
        context, streams.teacher_held, [streams.student_held], probe=space.probe
    )
    return method, report | measured


def _convert_layers(context: ConversionContext, method: Method, space: Workspace) -> list[dict[str, Any]]:
    """Every layer, from the first that is not finished; leaves both streams behind the last layer."""
    donor, rows, total = context.donor, context.rows, context.layers
    place = layer_steps.positions(donor, rows.fit.shape[1], context.device)
    for index, chosen in enumerate(space.layers):
        method.restore(index, chosen)
    if not space.streams_ready:
        _begin(context, space)
    streams = space.streams
    context.on_progress(Progress("layers", len(space.layers), total))
    for index in range(len(space.layers), total):
        begun = time.perf_counter()
        layer, rotary = layer_steps.read(donor, index, place, context.device)
        attention, chosen = _convert_layer(context, method, layer, index, streams, rotary)
        chosen |= {"index": index, "seconds": time.perf_counter() - begun}
        tensors = _layer_tensors(donor, method, index, attention, context.dtype)
        space.finish_layer(tensors, chosen, last=index + 1 == total)
        context.on_progress(Progress("layers", index + 1, total, error=chosen["relative_error"]))
    return space.layers


def _begin(context: ConversionContext, space: Workspace) -> None:
    """Embed the rows, and write the tensors that lie outside the layers."""
    donor, rows, dtype = context.donor, context.rows, context.dtype
    teacher = donor.embed(rows.all)
    blocks = layer_steps.block_steps(context.recipe, *rows.fit.shape)
    student = (teacher if blocks else teacher[len(rows.fit) :]).clone().to(dtype).float()
    outer = ((name, cast(name, donor.source.read(name), dtype)) for name in donor.outer_tensor_names())
    space.begin(teacher, student, len(rows.fit), outer, len(donor.shapes()) + 2 * context.layers)


def _convert_layer(
    context: ConversionContext,
    method: Method,
    layer: decoder_layer.Layer,
    index: int,
    streams: decoder_layer.Streams,
    rotary: LayerRotary,
) -> tuple[Any, dict[str, Any]]:
    """The new attention of one layer, what was chosen and what was measured; both streams move past it."""
    seen = layer_steps.observe(layer, index, method, streams.teacher, streams.fitted, rotary, context.dtype)
    attention, chosen = layer_steps.convert(context, method, index, seen)
    layer_steps.refine(context, layer, index, attention, streams)
    return attention, chosen | layer_steps.follow(layer, index, attention, seen, streams.student)


def _layer_tensors(donor: Donor, method: Method, index: int, attention: Any, dtype: torch.dtype) -> Any:
    """(name, tensor) of a converted layer: the new attention, and the donor's other tensors as they are."""
    names = donor.layer_tensor_names(index)
    prefix = names[0][: names[0].index(f".{index}.") + len(f".{index}.")]
    for name in names:
        if not name.removeprefix(prefix).startswith(method.replaced):
            yield name, cast(name, donor.source.read(name), dtype)
    for name, tensor in attention.state_dict().items():
        yield f"{prefix}self_attn.{name}", tensor.to(dtype)
