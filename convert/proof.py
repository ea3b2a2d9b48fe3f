"""The proof of a conversion, inside the pass's memory: held-out rows, and a reload in a bare process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.convert import calibrate, estimate, provenance
from mhconvert.convert.donor import Donor
from mhconvert.convert.recipe import Recipe
from mhconvert.convert.verify import verify
from mhconvert.convert.versions import versions
from mhconvert.convert.workspace import Workspace


def fidelity(
    donor: Donor,
    streams: calibrate.Streams,
    rows: calibrate.Rows,
    measure: Callable[[], Any],
    dtype: torch.dtype,
    device: torch.device,
    probe: Path,
) -> dict[str, Any]:
    """Perplexity, KL and agreement on the held-out rows; the student's logits of two rows go to `probe`."""
    predictions = measure()
    kept: list[Tensor] = []
    with torch.inference_mode():
        for row, teacher, student in zip(rows.held_out, streams.teacher_held, streams.student, strict=True):
            converted = donor.head(student.to(device), dtype).cpu()
            predictions.add(donor.head(teacher.to(device)).cpu()[:-1], converted[:-1], row[1:])
            if len(kept) < 2:
                kept.append(converted)
    provenance.write_probe(probe, rows.held_out[: len(kept)], torch.stack(kept))
    result = predictions.result()
    return {key: result[key] for key in ("perplexity", "kl", "top1_agreement")}


def reload(report: dict[str, Any], space: Workspace) -> None:
    """Reload in a bare process; the cache that `generate` leaves there is the one that is reported."""
    result = verify(space.partial, space.probe, prompt=provenance.PROMPT, threads=torch.get_num_threads())
    report["verified"] = result
    report["parameters"]["converted"] = result["parameters"]
    report["sample"] = {"prompt": result["sample"]["prompt"], "converted": result["sample"]["text"]}
    width = estimate.element_bytes(report["dtype"])
    report["kv_bytes_per_token"]["converted"] = result["cache"]["elements_per_token"] * width


def known_facts(
    recipe: Recipe,
    donor: Donor,
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
        "kv_bytes_per_token": {
            side: sum(layer["kv_elements"][side] for layer in layers) * estimate.element_bytes(sizes["dtype"])
            for side in ("donor", "converted")
        },
        "parameters": dict(sizes["parameters"]),
        "layers": layers,
        "calibration": {
            "sources": list(recipe.calibration.sources),
            "tokens": rows.fit.numel(),
            "held_out_tokens": rows.held_out.numel(),
            "sequence_length": rows.fit.shape[1],
        },
        "recipe": recipe.to_dict(),
        "versions": versions(),
    }
