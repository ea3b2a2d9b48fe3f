"""The measured facts of a conversion: fidelity on held-out rows, and a reload in a bare process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.library_versions import versions

from ..bare_process.reload import PROMPT, verify, write_probe
from ..calibration import calibration_rows
from ..methods.registry import info
from ..recipe.recipe import Recipe
from ..storage import dtype_cast
from .context import ConversionContext
from .resumable_run import Workspace

PROBE_ROWS = 2  # whose logits a reload is compared with


def measured(
    context: ConversionContext, teacher: Tensor, students: Sequence[Tensor], probe: Path | None = None
) -> list[dict[str, Any]]:
    """Perplexity, KL and agreement of each student with the teacher on the held-out rows.

    teacher, students (M, L, D): hidden states behind the last layer. The first student's logits of two rows go
    to `probe`.
    """
    donor, device, dtype = context.donor, context.device, context.dtype
    held_out = context.rows.held_out
    predictions = [context.measure() for _ in students]
    kept: list[Tensor] = []
    with torch.inference_mode():
        for index, row in enumerate(held_out):
            expected = donor.head(teacher[index].to(device)).cpu()[:-1]
            for student, found in zip(students, predictions, strict=True):
                converted = donor.head(student[index].to(device), dtype).cpu()
                found.add(expected, converted[:-1], row[1:])
                if probe is not None and student is students[0] and index < PROBE_ROWS:
                    kept.append(converted)
    if probe is not None:
        write_probe(probe, held_out[: len(kept)], torch.stack(kept))
    results = [found.result() for found in predictions]
    return [{key: result[key] for key in ("perplexity", "kl", "top1_agreement")} for result in results]


def add_reload(report: dict[str, Any], space: Workspace) -> None:
    """Reload the result in a bare process and report the cache size that is measured there."""
    result = verify(space.partial, space.probe, prompt=PROMPT, threads=torch.get_num_threads())
    report["verified"] = result
    report["parameters"]["converted"] = result["parameters"]
    report["sample"] = {"prompt": result["sample"]["prompt"], "converted": result["sample"]["text"]}
    width = dtype_cast.element_bytes(report["dtype"])
    report["kv_bytes_per_token"]["converted"] = result["cache"]["elements_per_token"] * width


def known_facts(
    context: ConversionContext, layers: list[dict[str, Any]], sizes: dict[str, Any], remote_code: bool
) -> dict[str, Any]:
    """Return the report's facts that need no measurement. remote_code: the folder contains a modeling file."""
    recipe, donor = context.recipe, context.donor
    return {
        "method": recipe.method,
        "donor": recipe.model,
        "donor_name": donor.name,
        "hub_id": donor.hub_id,
        "licence": donor.licence,
        "notice": donor.notice,
        "remote_code": remote_code,
        "dtype": sizes["dtype"],
        "kv_bytes_per_token": {
            side: sum(layer["kv_elements"][side] for layer in layers)
            * dtype_cast.element_bytes(sizes["dtype"])
            for side in ("donor", "converted")
        },
        "parameters": dict(sizes["parameters"]),
        **{name: sizes[name] for name in info(recipe.method).totals if name in sizes},
        "layers": layers,
        "calibration": calibration_facts(recipe, context.rows),
        "recipe": recipe.to_dict(),
        "versions": versions(),
    }


def calibration_facts(recipe: Recipe, rows: calibration_rows.Rows) -> dict[str, Any]:
    """Return the sources and numbers of tokens of the calibration text."""
    return {
        "sources": list(recipe.calibration.sources),
        "tokens": rows.fit.numel(),
        "held_out_tokens": rows.held_out.numel(),
        "sequence_length": rows.fit.shape[1],
    }
