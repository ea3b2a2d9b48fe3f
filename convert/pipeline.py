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
from torch import Tensor

from mhconvert.convert import calibrate, checkpoint, estimate, provenance
from mhconvert.convert.donor import Donor, open_donor
from mhconvert.convert.errors import CheckpointError, MhconvertError
from mhconvert.convert.methods import Method, build_method
from mhconvert.convert.progress import Listener, Progress, ignore
from mhconvert.convert.recipe import Recipe
from mhconvert.convert.verify import verify
from mhconvert.convert.workspace import Streams, Workspace

ABSURD_ERROR = 100.0  # of a layer's relative error: something is broken, not merely lossy
FIT_STEPS = {"quick": 0, "default": 100, "high": 400}
FIT_TOKENS = 1536  # a step


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do: sizes, KV arithmetic, disk and memory. Reads no weights, writes nothing."""
    device = _device(recipe.device)
    donor, method = _open(recipe, ignore)
    checkpoint.check_free(recipe.output_folder(donor.name), force=True)
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
    device = _device(recipe.device)
    donor, method = _open(recipe, tell)
    output, dtype = recipe.output_folder(donor.name), estimate.output_dtype(recipe, donor)
    checkpoint.check_free(output, force)
    _ = donor.source  # downloads, and checks every name and shape
    sizes = estimate.plan(recipe, donor, method, device)
    space = Workspace(output, recipe, sizes["disk_needed_bytes"], resume=resume, force=force)
    with space:
        rows = space.rows(lambda: calibrate.draw(recipe, donor, device, tell))
        layers = _convert_layers(recipe, donor, method, device, rows, space, fit, tell)
        report = _report(recipe, donor, method, rows, layers, sizes) | {"output": str(output)}
        report |= _fidelity(donor, space.streams, rows, measure, dtype, device, space.probe)
        space.finish_tensors()
        provenance.write_config(space.partial, method, donor, dtype)
        tell(Progress("verify", 0, 1))
        if recipe.verify:
            _verify(report, space)
        report["seconds"] = time.perf_counter() - started + space.earlier_seconds
        report["peak_rss_bytes"] = max(provenance.peak_rss(), report.get("verified", {}).get("peak_rss_bytes", 0))
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
    rotary = donor.rotary(device)
    positions = torch.arange(rows.fit.shape[1], device=device).unsqueeze(0)
    position_embeddings = rotary(torch.zeros(1, dtype=torch.float32, device=device), positions)
    for index, chosen in enumerate(space.layers):
        method.restore(index, chosen)
    if not space.streams_ready:
        teacher = donor.embed(rows.all)
        student = teacher[len(rows.fit) :].clone().to(dtype).float()
        outer = ((name, donor.source.read(name).to(dtype)) for name in donor.outer_tensor_names())
        space.begin(teacher, student, len(rows.fit), outer, len(donor.shapes()) + 2 * total)
    streams = space.streams
    tell(Progress("layers", len(space.layers), total))
    for index in range(len(space.layers), total):
        begun = time.perf_counter()
        layer = calibrate.Layer(
            donor.decoder_layer(index, device), donor.family.attention_norm, position_embeddings
        )
        attention, chosen = _convert_layer(recipe, method, layer, index, streams, rotary, position_embeddings, fit)
        _round_to(attention, dtype)
        error = _advance(layer, attention, streams, dtype)
        if not math.isfinite(error) or error > ABSURD_ERROR:
            raise CheckpointError(
                f"layer {index}: the converted attention's relative error is {error:.3g}; its weights or "
                "statistics are not usable. Try other calibration text or a larger budget"
            )
        chosen |= {"index": index, "relative_error": error, "seconds": time.perf_counter() - begun}
        space.finish_layer(_layer_tensors(donor, method, index, attention, dtype), chosen)
        tell(Progress("layers", index + 1, total, f"layer {index + 1}/{total}", error))
    return space.layers


def _convert_layer(
    recipe: Recipe,
    method: Method,
    layer: calibrate.Layer,
    index: int,
    streams: Streams,
    rotary: Any,
    position_embeddings: tuple[Tensor, Tensor],
    fit: Callable[..., None],
) -> tuple[Any, dict[str, Any]]:
    """Closed form on the teacher's stream, then the fit to the donor's attention outputs."""
    inputs = layer.attention_inputs(streams.teacher_fit)
    targets = layer.attend(layer.attention, inputs)
    attention, chosen = method.convert(layer.attention, index, inputs, targets, position_embeddings, rotary)
    steps = FIT_STEPS[recipe.effort] if recipe.fit_steps is None else recipe.fit_steps
    if steps:
        rows = max(1, FIT_TOKENS // inputs.shape[1])
        seed = recipe.seed * 1000 + index
        fit(attention, inputs, targets, position_embeddings, steps=steps, rows=rows, seed=seed)
    streams.outputs = targets
    return attention, chosen


def _advance(layer: calibrate.Layer, attention: Any, streams: Streams, dtype: torch.dtype) -> float:
    """Move both streams past the layer; the held-out rows' relative squared error of the attention output."""
    held = streams.teacher_held
    inputs = layer.attention_inputs(held)
    outputs = layer.attend(layer.attention, inputs)
    converted = layer.attend(attention, inputs)
    error = ((converted - outputs).square().sum() / outputs.square().sum()).item()
    layer.complete(streams.teacher_fit, streams.outputs)
    layer.complete(held, outputs)
    _round_to(layer.module, dtype)
    student = streams.student
    layer.complete(student, layer.attend(attention, layer.attention_inputs(student)))
    return error


@torch.no_grad()
def _round_to(attention: Any, dtype: torch.dtype) -> None:
    """What is measured from here on are the weights as they will be written."""
    for parameter in attention.parameters():
        parameter.copy_(parameter.to(dtype))


def _layer_tensors(donor: Donor, method: Method, index: int, attention: Any, dtype: torch.dtype) -> Any:
    """(name, tensor) of a converted layer: the new attention, and the donor's other tensors as they are."""
    names = donor.layer_tensor_names(index)
    prefix = names[0][: names[0].index(f".{index}.") + len(f".{index}.")]
    for name in names:
        if not name.removeprefix(prefix).startswith(method.replaced):
            yield name, donor.source.read(name).to(dtype)
    for name, tensor in attention.state_dict().items():
        yield f"{prefix}self_attn.{name}", tensor.to(dtype)


def _fidelity(
    donor: Donor,
    streams: Streams,
    rows: calibrate.Rows,
    measure: Callable[[], Any],
    dtype: torch.dtype,
    device: torch.device,
    probe: Path,
) -> dict[str, Any]:
    """Perplexity, KL and agreement on the held-out rows; the student's logits of two rows go to `probe`."""
    fidelity, kept = measure(), []
    with torch.inference_mode():
        for row, teacher, student in zip(rows.held_out, streams.teacher_held, streams.student, strict=True):
            converted = donor.head(student.to(device), dtype).cpu()
            fidelity.add(donor.head(teacher.to(device)).cpu()[:-1], converted[:-1], row[1:])
            if len(kept) < 2:
                kept.append(converted)
    provenance.write_probe(probe, rows.held_out[: len(kept)], torch.stack(kept))
    result = fidelity.result()
    return {key: result[key] for key in ("perplexity", "kl", "top1_agreement")}


def _verify(report: dict[str, Any], space: Workspace) -> None:
    """Reload in a bare process; what it measures of the cache replaces what was computed."""
    result = verify(space.partial, space.probe, prompt=provenance.PROMPT, threads=torch.get_num_threads())
    report["verified"] = result
    report["parameters"]["converted"] = result["parameters"]
    report["sample"] = {"prompt": result["sample"]["prompt"], "converted": result["sample"]["text"]}
    width = estimate.element_bytes(report["dtype"])
    report["kv_bytes_per_token"]["converted"] = result["cache"]["elements_per_token"] * width


def _report(
    recipe: Recipe,
    donor: Donor,
    method: Method,
    rows: calibrate.Rows,
    layers: list[dict[str, Any]],
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "method": recipe.method,
        "donor": recipe.model,
        "donor_name": donor.name,
        "hub_id": donor.hub_id,
        "licence": donor.licence,
        "notice": donor.notice,
        "dtype": sizes["dtype"],
        "kv_bytes_per_token": dict(sizes["kv_bytes_per_token"]),
        "parameters": dict(sizes["parameters"]),
        "layers": layers,
        "calibration": {
            "sources": list(recipe.calibration.sources),
            "tokens": rows.fit.numel(),
            "held_out_tokens": rows.held_out.numel(),
            "sequence_length": rows.fit.shape[1],
        },
        "recipe": recipe.to_dict(),
        "versions": provenance.versions(),
    }


def _device(name: str | None) -> torch.device:
    """The torch device called `name`; None: CUDA if present. Raises MhconvertError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MhconvertError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


