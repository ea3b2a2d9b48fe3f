"""The pass: one decoder layer at a time from a donor to a converted checkpoint.

    resolve ▸ plan ▸ for each layer: read ▸ observe ▸ convert ▸ fit ▸ check ▸ write ▸ finish ▸ verify

Two streams of hidden states are all that passes from layer to layer: the donor's own (the teacher) and the
converted model's (the student). Everything is written to OUT.partial, which is renamed when it is whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhconvert.convert import calibrate, checkpoint, estimate, proof, provenance
from mhconvert.convert.device import pick_device
from mhconvert.convert.donor import Donor, open_donor
from mhconvert.convert.errors import CheckpointError
from mhconvert.convert.families import layer_window
from mhconvert.convert.linalg import relative_error
from mhconvert.convert.methods import Method, build_method
from mhconvert.convert.numbers import cast, require_finite_states
from mhconvert.convert.progress import Listener, Progress, ignore
from mhconvert.convert.recipe import Recipe
from mhconvert.convert.rotary import LayerRotary, layer_rotary
from mhconvert.convert.workspace import Workspace

ABSURD_ERROR = 100.0  # of a layer's relative error: something is broken, not merely lossy
FIT_STEPS = {"quick": 0, "default": 80, "high": 400}
FIT_TOKENS = 1536  # a step


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do: sizes, KV arithmetic, disk and memory. Reads no weights, writes nothing."""
    device = pick_device(recipe.device)
    donor, method = _open(recipe, ignore)
    checkpoint.check_free(recipe.output_folder(donor.name), True, donor.folder)
    return estimate.plan(recipe, donor, method, device)


def run(
    recipe: Recipe,
    *,
    fit: Callable[..., None],
    measure: Callable[[], Any],
    finish: Callable[[Path, dict[str, Any]], None],
    resume: bool = False,
    force: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; returns its report.

    fit: trains a converted attention in place (`heal.local.fit`). measure: makes an accumulator of predictions
    (`eval.fidelity.Fidelity`). finish: writes the report into the folder (`eval.report.write_report`).
    Raises MhconvertError for what a user can mend; the output folder then does not exist or is as it was.
    """
    started, tell = time.perf_counter(), on_progress or ignore
    device = pick_device(recipe.device)
    donor, method = _open(recipe, tell)
    output, dtype = recipe.output_folder(donor.name), estimate.output_dtype(recipe, donor)
    checkpoint.check_free(output, force, donor.folder)
    _ = donor.source  # downloads, and checks every name and shape
    sizes = estimate.plan(recipe, donor, method, device)
    space = Workspace(output, recipe, sizes["disk_needed_bytes"], resume=resume, force=force)
    with space:
        rows = space.rows(lambda: calibrate.draw(recipe, donor, device, tell))
        layers = _convert_layers(recipe, donor, method, device, rows, space, fit, tell)
        report = proof.known_facts(recipe, donor, rows, layers, sizes) | {"output": str(output)}
        report |= proof.fidelity(donor, space.streams, rows, measure, dtype, device, space.probe)
        space.release_streams()
        donor.release()
        space.finish_tensors()
        provenance.write_config(space.partial, method, donor, dtype)
        tell(Progress("verify", 0, 1))
        if recipe.verify:
            proof.reload(report, space)
        report["seconds"] = time.perf_counter() - started + space.earlier_seconds
        report["peak_rss_bytes"] = max(
            provenance.peak_rss(), report.get("verified", {}).get("peak_rss_bytes", 0)
        )
        finish(space.partial, report)
        provenance.write_provenance(space.partial, recipe, donor, report)
        space.publish()
    tell(Progress("done", 1, 1, str(output)))
    return report


def _open(recipe: Recipe, tell: Listener) -> tuple[Donor, Method]:
    """The donor and the method for it. Every refusal that needs no weights happens here."""
    checkpoint.byte_size(recipe.max_shard_size)
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    method = build_method(recipe.method, donor.config, recipe.settings, recipe.effort)
    calibrate.check(recipe, donor.config)
    estimate.output_dtype(recipe, donor)
    return donor, method


def _convert_layers(
    recipe: Recipe,
    donor: Donor,
    method: Method,
    device: torch.device,
    rows: calibrate.Rows,
    space: Workspace,
    fit: Callable[..., None],
    tell: Listener,
) -> list[dict[str, Any]]:
    """Every layer, from the first that is not finished; leaves both streams behind the last layer."""
    total, dtype = donor.config.num_hidden_layers, estimate.output_dtype(recipe, donor)
    rotary_module, length = donor.rotary(device), rows.fit.shape[1]
    for index, chosen in enumerate(space.layers):
        method.restore(index, chosen)
    if not space.streams_ready:
        teacher = donor.embed(rows.all)
        student = teacher[len(rows.fit) :].clone().to(dtype).float()
        names = donor.outer_tensor_names()
        outer = ((name, cast(name, donor.source.read(name), dtype)) for name in names)
        space.begin(teacher, student, len(rows.fit), outer, len(donor.shapes()) + 2 * total)
    streams = space.streams
    tell(Progress("layers", len(space.layers), total))
    for index in range(len(space.layers), total):
        begun = time.perf_counter()
        rotary = layer_rotary(rotary_module, donor.config, index, length)
        layer = calibrate.Layer(
            donor.decoder_layer(index, device),
            donor.family.attention_norm,
            rotary.embeddings,
            layer_window(donor.config, index),
        )
        attention, chosen = _convert_layer(recipe, method, layer, index, streams, rotary, fit)
        _round_to(attention, dtype, f"layer {index}: self_attn.")
        measured = _advance(layer, attention, streams, dtype, index)
        error = measured["relative_error"]
        if not math.isfinite(error) or error > ABSURD_ERROR:
            raise CheckpointError(
                f"layer {index}: the converted attention's relative error is {error:.3g}; its weights or "
                "statistics are not usable. Try other calibration text or a larger budget"
            )
        chosen |= {"index": index, "seconds": time.perf_counter() - begun} | measured
        tensors = _layer_tensors(donor, method, index, attention, dtype)
        space.finish_layer(tensors, chosen, last=index + 1 == total)
        tell(Progress("layers", index + 1, total, error=error))
    return space.layers


def _convert_layer(
    recipe: Recipe,
    method: Method,
    layer: calibrate.Layer,
    index: int,
    streams: calibrate.Streams,
    rotary: LayerRotary,
    fit: Callable[..., None],
) -> tuple[Any, dict[str, Any]]:
    """Closed form on the teacher's stream, then the fit to the donor's attention outputs."""
    inputs = layer.attention_inputs(streams.teacher_fit)
    targets = layer.attend(layer.attention, inputs)
    require_finite_states(index, attention_inputs=inputs, attention_outputs=targets)
    attention, chosen = method.convert(layer.attention, index, inputs, targets, rotary.embeddings, rotary)
    steps = FIT_STEPS[recipe.effort] if recipe.fit_steps is None else recipe.fit_steps
    if steps:
        rows = max(1, FIT_TOKENS // inputs.shape[1])
        seed = recipe.seed * 1000 + index
        fit(attention, inputs, targets, rotary.embeddings, steps=steps, rows=rows, seed=seed)
    streams.outputs = targets
    return attention, chosen


def _advance(
    layer: calibrate.Layer, attention: Any, streams: calibrate.Streams, dtype: torch.dtype, index: int
) -> dict[str, Any]:
    """Move both streams past the layer; what the held-out rows say of it.

    relative_error: of the attention output, squared; kv_elements: what one token leaves in a cache object.
    """
    held = streams.teacher_held
    inputs = layer.attention_inputs(held)
    outputs = layer.attend(layer.attention, inputs)
    converted = layer.attend(attention, inputs)
    error = relative_error(converted, outputs)
    elements = {
        "donor": layer.cache_elements(layer.attention, inputs),
        "converted": layer.cache_elements(attention, inputs),
    }
    layer.complete(streams.teacher_fit, streams.outputs)
    layer.complete(held, outputs)
    del layer.module.self_attn  # the donor's is not written
    _round_to(layer.module, dtype, f"layer {index}: ")
    student = streams.student
    layer.complete(student, layer.attend(attention, layer.attention_inputs(student)))
    return {"relative_error": error, "kv_elements": elements}


@torch.no_grad()
def _round_to(module: Any, dtype: torch.dtype, where: str) -> None:
    """What is measured from here on are the weights as they will be written."""
    for name, parameter in module.named_parameters():
        parameter.copy_(cast(where + name, parameter, dtype))


def _layer_tensors(donor: Donor, method: Method, index: int, attention: Any, dtype: torch.dtype) -> Any:
    """(name, tensor) of a converted layer: the new attention, and the donor's other tensors as they are."""
    names = donor.layer_tensor_names(index)
    prefix = names[0][: names[0].index(f".{index}.") + len(f".{index}.")]
    for name in names:
        if not name.removeprefix(prefix).startswith(method.replaced):
            yield name, cast(name, donor.source.read(name), dtype)
    for name, tensor in attention.state_dict().items():
        yield f"{prefix}self_attn.{name}", tensor.to(dtype)
