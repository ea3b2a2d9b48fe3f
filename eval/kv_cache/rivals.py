"""The unconverted donor with caches of codes, as points beside those of a conversion's curve, in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.progress import Listener, Progress

from ...convert.calibration import calibration_rows
from ...convert.open_model import OpenModel, open_model
from ...convert.recipe.recipe import Recipe
from ..cache_size import elements_per_token
from ..fidelity import Fidelity, text_rows
from ..settings import OWN_CACHE
from .serving import cached_forward, require

SHARE_OF = "the bytes of the donor's cache at 16 bits an element"
ELEMENT_BYTES = 2  # a share of bytes is of 16-bit elements, whatever dtype the donor is stored in


class Beside:
    """What a curve has beside its points: own rows to measure on, shares of bytes, and the donor's points.

    Raises:
        MhconvertError: the donor's cache cannot have one of the dtypes.
    """

    def __init__(
        self, recipe: Recipe, text: Path | None, sequences: int, dtypes: Sequence[str], on_progress: Listener
    ) -> None:
        """
        Args:
            recipe: of the curve.
            text: measured on, `sequences` rows of it; None: the held-out rows of the recipe.
            dtypes: of the donor's caches; none: the donor is not opened.
            on_progress: called with the progress.
        """
        self.recipe, self.text, self.sequences, self.on_progress = recipe, text, sequences, on_progress
        self.dtypes = [dtype for dtype in dict.fromkeys(dtypes) if dtype != OWN_CACHE]
        self.rows: Tensor | None = None
        if self.dtypes:
            trust = recipe.trust_remote_code
            self.opened = open_model(recipe.model, device=recipe.device, trust_remote_code=trust)
            for dtype in self.dtypes:
                require(self.opened, dtype)

    @property
    def held_out(self) -> Callable[[Any, int], Tensor] | None:
        """From the donor's tokenizer and the tokens of a row to rows (rows, length); None: the curve has its own."""
        return self._draw if self.text is not None or self.dtypes else None

    def _draw(self, tokenizer: Any, length: int) -> Tensor:
        if self.text is not None:
            self.rows = text_rows(tokenizer, self.text, length, self.sequences)
        else:
            # The rows that the curve will draw, once more from the same seed; sampled text is sampled twice.
            assert self.opened.donor is not None
            device = torch.device(self.opened.device)
            drawn = calibration_rows.draw(self.recipe, self.opened.donor, device, self.on_progress)
            self.rows = drawn.held_out
        return self.rows

    def completed(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` of the curve with kv_share in every point, kv_share_of, baselines and measured_on."""
        coded = getattr(self.recipe.settings, "coded", False)
        points = [point | {"kv_share": _share(point, result, coded)} for point in result["points"]]
        rivals: list[dict[str, Any]] = []
        if self.dtypes:
            assert self.rows is not None
            rivals = measure(
                self.opened, self.dtypes, self.rows, self.on_progress, result.get("cache_context")
            )
        measured_on = str(self.text) if self.text is not None else "held-out calibration text"
        context = result.get("cache_context")
        share_of = SHARE_OF + (f", at {context:,} tokens" if context else "")
        more = {"kv_share_of": share_of, "baselines": rivals, "measured_on": measured_on}
        return result | {"points": points} | more


def _share(point: dict[str, Any], result: dict[str, Any], coded: bool) -> float:
    """A point's share of the bytes of the donor's cache at 16 bits an element. The bytes of codes are what they are in
    donors of any dtype; elements count two bytes each."""
    elements: float = result["kv_elements_per_token"]
    if coded:
        return float(point["kv_bytes_per_token"] / (ELEMENT_BYTES * elements))
    return float(point["kv_elements_per_token"] / elements)


def measure(
    opened: OpenModel,
    dtypes: Sequence[str],
    rows: Tensor,
    on_progress: Listener,
    context: int | None = None,
) -> list[dict[str, Any]]:
    """A point for the donor with a cache of each of `dtypes`, the most bytes first; the whole donor is in memory.

    Args:
        opened: the donor, computed in float32.
        dtypes: of caches.
        rows: token ids (rows, length).
        context: tokens in the cache that is measured; None: whole groups of codes.

    Returns:
        Per point: name, kv_cache_dtype, kv_elements_per_token (bytes / 2) and kv_bytes_per_token, measured on the cache
        object; kv_share (of the bytes of the donor's 16-bit elements); kl, perplexity {donor,
        converted}, perplexity_ratio, top1_agreement, seconds.
    """
    model = opened.model()
    lengths = [context] if context else []
    [elements] = elements_per_token(model, lengths)
    points = []
    for dtype in dtypes:
        [held] = elements_per_token(model, lengths, dtype)
        size = {
            "kv_elements_per_token": held,
            "kv_bytes_per_token": held * ELEMENT_BYTES,
            "kv_share": held / elements,
        }
        points.append(_point(model, dtype, rows, on_progress) | size)
    return sorted(points, key=lambda point: -point["kv_share"])


def _point(model: Any, dtype: str, rows: Tensor, on_progress: Listener) -> dict[str, Any]:
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
    return {
        "name": name,
        "kv_cache_dtype": dtype,
        "kl": found["kl"],
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["converted"] / perplexity["donor"],
        "top1_agreement": found["top1_agreement"],
        "seconds": time.perf_counter() - started,
    }
