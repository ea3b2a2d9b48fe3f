"""The report of a conversion: what was chosen, fidelity on held-out rows, and the reload in a bare process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.library_versions import versions

from ..bare_process.reload import PROMPT, verify, write_probe
from ..checkpoint.provenance import needs_remote_code
from ..methods.registry import info, whole_elements
from ..storage.dtype_cast import DTYPES
from .context import ConversionContext
from .loss_by_source import by_source, warnings

PROBE_ROWS, PROBE_TOKENS = 2, 512  # the most whose logits a reload is compared with; one row at least


def conversion_facts(
    context: ConversionContext, layers: list[dict[str, Any]], sizes: dict[str, Any], model_class: Any
) -> dict[str, Any]:
    """What is known before anything is measured.

    Args:
        layers: what was chosen and measured for each layer.
        sizes: `cost_estimate.plan` of the conversion.
        model_class: of the result.
    """
    recipe, donor, width = context.recipe, context.donor, context.dtype.itemsize
    return {
        "method": recipe.method,
        "donor": recipe.model,
        "donor_name": donor.name,
        "hub_id": donor.hub_id,
        "licence": donor.licence,
        "notice": "; ".join(text for text in (donor.notice, sizes.get("notice")) if text) or None,
        "remote_code": needs_remote_code(model_class),  # the folder carries its own modeling file
        "dtype": sizes["dtype"],
        "kv_bytes_per_token": {
            side: counted(layers, side, sizes.get("cache_context")) * width for side in ("donor", "converted")
        },
        "parameters": dict(sizes["parameters"]),
        **{
            name: sizes[name]
            for name in (*info(recipe.method).totals, "cache_context", "priced")
            if name in sizes
        },
        "layers": layers,
        "calibration": calibration_facts(context)
        | {name: text for name, text in sizes["calibration"].items() if name == "notice"},
        "recipe": recipe.to_dict(),
        "versions": versions(),
    }


def calibration_facts(context: ConversionContext) -> dict[str, Any]:
    """The calibration text, in tokens."""
    rows = context.rows
    return {
        "sources": list(context.recipe.calibration.sources),
        "tokens": rows.fit.numel(),
        "held_out_tokens": rows.held_out.numel(),
        "sequence_length": rows.fit.shape[1],
    }


def held_out_fidelity(
    context: ConversionContext, teacher: Tensor, students: Sequence[Tensor], probe: Path | None = None
) -> list[dict[str, Any]]:
    """Perplexity, KL and top-1 agreement of each student with the teacher on the held-out rows; by_source, and warnings
    of it, where the rows are of several sources.

    Args:
        teacher, students: (M, L, D), hidden states behind the last layer; the teacher is `context.first`.
        probe: where the first student's logits of `probe_rows` rows are written, for `add_reload`.
    """
    donor, held_out = context.donor, context.rows.held_out
    predictions = [context.measure() for _ in students]
    parts: list[dict[str, list[Any]]] = [{} for _ in students]
    sources = context.rows.sources or [""] * len(held_out)
    kept: list[Tensor] = []
    with torch.inference_mode():
        for index, row in enumerate(held_out):
            expected = context.first.head(teacher[index].to(context.device)).cpu()[:-1]
            for number, (student, prediction) in enumerate(zip(students, predictions, strict=True)):
                converted = donor.head(student[index].to(context.device), context.dtype).cpu()
                part = context.measure()
                part.add(expected, converted[:-1], row[1:])
                prediction.merge(part)
                parts[number].setdefault(sources[index], []).append(part)
                if probe is not None and number == 0 and index < probe_rows(held_out.shape[1]):
                    kept.append(converted)
    if probe is not None:
        write_probe(probe, held_out[: len(kept)], torch.stack(kept))
    results = [prediction.result() for prediction in predictions]
    return [
        {key: result[key] for key in ("perplexity", "kl", "top1_agreement")} | _by_source(part)
        for result, part in zip(results, parts, strict=True)
    ]


def _by_source(parts: dict[str, list[Any]]) -> dict[str, Any]:
    """by_source and warnings, each where there is one."""
    found = by_source(parts)
    return {name: value for name, value in (("by_source", found), ("warnings", warnings(found))) if value}


def probe_rows(length: int) -> int:
    """How many rows of `length` tokens a reload is compared on."""
    return max(1, min(PROBE_ROWS, PROBE_TOKENS // length))


def add_reload(report: dict[str, Any], folder: Path, probe: Path, trusted: bool) -> None:
    """Reload `folder` in a bare process; the cache that `generate` leaves there is the one that is reported."""
    context = report.get("cache_context")
    result = verify(
        folder, probe, prompt=PROMPT, threads=torch.get_num_threads(), trusted=trusted, context=context
    )
    report["verified"] = result
    report["parameters"]["converted"] = result["parameters"]
    report["sample"] = {"prompt": result["sample"]["prompt"], "converted": result["sample"]["text"]}
    width = DTYPES[report["dtype"]].itemsize
    elements = _whole(result["cache"]["elements_per_token"], report["layers"], context)
    report["kv_bytes_per_token"]["converted"] = elements * width


def counted(layers: list[dict[str, Any]], side: str, context: int | None) -> float:
    """Cache elements per token of `side`, "donor" or "converted", as plans count them."""
    return _whole(sum(layer["kv_elements"][side] for layer in layers), layers, context)


def _whole(elements: float, layers: list[dict[str, Any]], context: int | None) -> float:
    """Codes are counted by their bytes, others rounded up at the context."""
    return (
        elements if any("kv_code_bytes" in layer for layer in layers) else whole_elements(elements, context)
    )
