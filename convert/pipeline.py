"""The pass: one decoder layer at a time from a donor to a converted checkpoint.

    resolve ▸ survey ▸ plan ▸ for each layer: read ▸ observe ▸ convert ▸ fit ▸ check ▸ write ▸ finish ▸ verify

The survey is short, and left out where layers cannot differ in size.
A tolerance instead of a budget puts a search before the layers (`search`), and repeats them where it misses.
Two streams of hidden states are all that passes from layer to layer: the donor's own (the teacher) and the
converted model's (the student). Everything is written to OUT.partial, which is renamed when it is whole.
"""

from __future__ import annotations

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
from .layer_pass.resumable_run import Workspace
from .layer_pass.tolerance_search import Search, meet
from .methods.registry import Method, build_method
from .recipe.recipe import Recipe
from .storage import output_folder, shard_writer
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
        method.share_out(survey.run(recipe, donor, device, rows, surveyed, tell))
    sizes = cost_estimate.plan(recipe, donor, method, device)
    return sizes if recipe.tolerance is None else sizes | {"tolerance": recipe.tolerance, "layers": []}


def run(
    recipe: Recipe,
    *,
    fit: layer_steps.Fit,
    measure: Callable[[], Any],
    finish: Callable[[Path, dict[str, Any]], None],
    resume: bool = False,
    force: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; returns its report.

    fit: trains a converted attention in place (`heal.local.fit`). measure: makes an accumulator of predictions
    (`eval.fidelity.Fidelity`). finish: writes the report into the folder (`eval.card.write_report`).
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
        needs = functools.partial(
            space.needs, functools.partial(survey.run, recipe, donor, device, rows, measure, tell)
        )
        attempt = functools.partial(
            _attempt,
            donor=donor,
            device=device,
            rows=rows,
            needs=needs,
            space=space,
            fit=fit,
            measure=measure,
            tell=tell,
        )
        if recipe.tolerance is None:
            method, report = attempt(recipe)
        else:
            find = Search(recipe, donor, device, rows, needs, fit, measure, tell).find
            recipe, method, report = meet(recipe, space, find, attempt, _planned_elements(donor), tell)
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
        provenance.write_provenance(space.partial, recipe, donor, report)
        space.publish()
    tell(Progress("done", 1, 1, str(output)))
    return report


def _planned_elements(donor: Donor) -> Callable[[Recipe], int]:
    """How many elements a token of a conversion would leave in its cache."""

    def planned(recipe: Recipe) -> int:
        return build_method(recipe.method, donor.config, recipe.settings, recipe.effort).kv_elements()

    return planned


def _open(recipe: Recipe, tell: Listener) -> tuple[Donor, Method]:
    """The donor and the method for it (at the whole budget where it is searched).

    Every refusal that needs no weights happens here.
    """
    shard_writer.byte_size(recipe.max_shard_size)
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    largest = recipe if recipe.tolerance is None else recipe.at_budget(1.0)
    method = build_method(recipe.method, donor.config, largest.settings, recipe.effort)
    calibration_rows.check(recipe, donor.config)
    cost_estimate.output_dtype(recipe, donor)
    return donor, method


def _attempt(
    recipe: Recipe,
    *,
    donor: Donor,
    device: torch.device,
    rows: calibration_rows.Rows,
    needs: survey.Needs,
    space: Workspace,
    fit: layer_steps.Fit,
    measure: Callable[[], Any],
    tell: Listener,
) -> tuple[Method, dict[str, Any]]:
    """Convert every layer into `space`, and measure the result on the held-out rows."""
    method = survey.planned_method(recipe, donor, needs)
    layers = _convert_layers(recipe, donor, method, device, rows, space, fit, tell)
    sizes = cost_estimate.plan(recipe, donor, method, device)
    remote = provenance.needs_remote_code(method.model_class)
    report = conversion_report.known_facts(recipe, donor, rows, layers, sizes, remote)
    dtype, streams = cost_estimate.output_dtype(recipe, donor), space.streams
    hidden = (streams.teacher_held, [streams.student_held])
    [found] = conversion_report.fidelity(donor, *hidden, rows.held_out, measure, dtype, device, space.probe)
    return method, report | found


def _convert_layers(
    recipe: Recipe,
    donor: Donor,
    method: Method,
    device: torch.device,
    rows: calibration_rows.Rows,
    space: Workspace,
    fit: layer_steps.Fit,
    tell: Listener,
) -> list[dict[str, Any]]:
    """Every layer, from the first that is not finished; leaves both streams behind the last layer."""
    total, dtype = donor.config.num_hidden_layers, cost_estimate.output_dtype(recipe, donor)
    place = layer_steps.positions(donor, rows.fit.shape[1], device)
    for index, chosen in enumerate(space.layers):
        method.restore(index, chosen)
    if not space.streams_ready:
        teacher = donor.embed(rows.all)
        blocks = layer_steps.block_steps(recipe, *rows.fit.shape)
        student = (teacher if blocks else teacher[len(rows.fit) :]).clone().to(dtype).float()
        names = donor.outer_tensor_names()
        outer = ((name, cast(name, donor.source.read(name), dtype)) for name in names)
        space.begin(teacher, student, len(rows.fit), outer, len(donor.shapes()) + 2 * total)
    streams = space.streams
    tell(Progress("layers", len(space.layers), total))
    for index in range(len(space.layers), total):
        begun = time.perf_counter()
        layer, rotary = layer_steps.read(donor, index, place, device)
        attention, chosen = _convert_layer(recipe, donor, method, layer, index, streams, rotary, fit, dtype)
        chosen |= {"index": index, "seconds": time.perf_counter() - begun}
        tensors = _layer_tensors(donor, method, index, attention, dtype)
        space.finish_layer(tensors, chosen, last=index + 1 == total)
        tell(Progress("layers", index + 1, total, error=chosen["relative_error"]))
    return space.layers


def _convert_layer(
    recipe: Recipe,
    donor: Donor,
    method: Method,
    layer: decoder_layer.Layer,
    index: int,
    streams: decoder_layer.Streams,
    rotary: LayerRotary,
    fit: layer_steps.Fit,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, Any]]:
    """The new attention of one layer, what was chosen and what was measured; both streams move past it."""
    seen = layer_steps.observe(layer, index, method, streams.teacher, streams.fitted, rotary, dtype)
    attention, chosen = layer_steps.convert(recipe, method, index, seen, fit, dtype)
    layer_steps.refine(recipe, donor, layer, index, attention, streams, fit, dtype)
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
