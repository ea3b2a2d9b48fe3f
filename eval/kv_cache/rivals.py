"""The unconverted donor with caches of codes, as points beside those of a conversion's curve, in bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhconvert.progress import Listener, Progress

from ...convert.calibration import calibration_rows
from ...convert.open_model import OpenModel
from ...convert.recipe.recipe import Recipe
from ..cache_size import measure_cache
from ..fidelity import Fidelity
from .serving import cached_forward

SHARE_OF = "the bytes of the donor's cache at 16 bits an element"
ELEMENT_BYTES = 2  # a share of bytes is of 16-bit elements, whatever dtype the donor is stored in


def add_shares(result: dict[str, Any], coded: bool) -> None:
    """Give every point of a curve `kv_share`, its share of the bytes of the donor's cache at 16 bits an element.

    coded: the points' caches hold codes, whose bytes are what they are in donors of any dtype.
    """
    elements = result["kv_elements_per_token"]
    for point in result["points"]:
        if coded:
            point["kv_share"] = point["kv_bytes_per_token"] / (ELEMENT_BYTES * elements)
        else:
            point["kv_share"] = point["kv_elements_per_token"] / elements


def held_out_rows(recipe: Recipe, opened: OpenModel, on_progress: Listener) -> Tensor:
    """The rows (rows, length) that a conversion by `recipe` would be measured on.

    They are drawn once more, from the recipe's seed; text sampled from the donor is sampled twice.
    """
    assert opened.donor is not None
    device = torch.device(opened.device)
    return calibration_rows.draw(recipe, opened.donor, device, on_progress).held_out


def measure(
    opened: OpenModel, dtypes: Sequence[str], rows: Tensor, on_progress: Listener
) -> list[dict[str, Any]]:
    """A point for the donor with a cache of each of `dtypes`, the most bytes first; the whole donor is in memory.

    Args:
        opened: the donor, computed in float32.
        dtypes: of caches.
        rows: token ids (rows, length).

    Returns:
        Per point: name, kv_cache_dtype, kv_elements_per_token (bytes / 2) and kv_bytes_per_token, measured on the cache
        object behind whole groups; kv_share (of the bytes of the donor's 16-bit elements); kl, perplexity {donor,
        converted}, perplexity_ratio, top1_agreement, seconds.
    """
    model = opened.model()
    elements = measure_cache(model).elements_per_token
    points = [_point(model, dtype, rows, elements, on_progress) for dtype in dict.fromkeys(dtypes)]
    return sorted(points, key=lambda point: -point["kv_share"])


def _point(model: Any, dtype: str, rows: Tensor, elements: float, on_progress: Listener) -> dict[str, Any]:
    started, fidelity = time.perf_counter(), Fidelity()
    name, forward = f"donor {dtype}", cached_forward(model, dtype)
    on_progress(Progress("tasks", 0, len(rows), name))
    with torch.inference_mode():
        for index, row in enumerate(rows):
            ids = row[None].to(model.device)
            exact = model(input_ids=ids, use_cache=False).logits[0, :-1].cpu()
            coded = forward(input_ids=ids).logits[0, :-1].cpu()
            fidelity.add(exact, coded, row[1:])
            on_progress(Progress("tasks", index + 1, len(rows), name))
    found = fidelity.result()
    perplexity = found["perplexity"]
    held = measure_cache(model, dtype=dtype).elements_per_token
    return {
        "name": name,
        "kv_cache_dtype": dtype,
        "kv_elements_per_token": held,
        "kv_bytes_per_token": held * ELEMENT_BYTES,
        "kv_share": held / elements,
        "kl": found["kl"],
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["converted"] / perplexity["donor"],
        "top1_agreement": found["top1_agreement"],
        "seconds": time.perf_counter() - started,
    }
