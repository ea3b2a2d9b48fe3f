"""Fidelity of several models to one donor on several texts, and what their caches hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import cache_size, fidelity
from .result_cache import Store
from .tasks.harness import Candidate


def compare(
    candidates: Sequence[Candidate],
    rows: Mapping[str, Tensor],
    store: Store,
    *,
    fresh: bool,
    on_rows: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """texts: the models' perplexity, kl and top1_agreement on each of `rows`, (sequences, sequence_length) ids;
    cache: each model's kv_elements_per_token, measured. The first candidate is the donor. float32.

    Two models are in memory, the donor and one other; what `store` has is not measured again unless `fresh`.
    """
    if not rows:
        return {"texts": [], "cache": None}
    donor, *others = candidates
    loaded = _Once(donor)
    found = [_measured(each, loaded, rows, store, fresh, on_rows) for each in others or [donor]]
    texts = []
    for index, (text, ids) in enumerate(rows.items()):
        of_text = [each["texts"][index] for each in found]
        models = [{"perplexity": of_text[0]["perplexity"]["donor"], "kl": 0.0, "top1_agreement": 1.0}]
        for measured in of_text if others else []:
            figures = {name: measured[name] for name in ("kl", "top1_agreement")}
            models.append({"perplexity": measured["perplexity"]["converted"]} | figures)
        shape = {"sequences": ids.shape[0], "sequence_length": ids.shape[1]}
        texts.append({"text": text, **shape, "tokens": of_text[0]["tokens"], "models": models})
    caches = [found[0]["cache"][0], *(each["cache"][1] for each in found if others)]
    return {"texts": texts, "cache": [{"kv_elements_per_token": elements} for elements in caches]}


class _Once:
    """The donor's model, read when it is first needed."""

    def __init__(self, donor: Candidate) -> None:
        self.donor, self._model = donor, None

    def model(self) -> Any:
        if self._model is None:
            self._model = self.donor.opened.model()
        return self._model


def _measured(
    candidate: Candidate,
    donor: _Once,
    rows: Mapping[str, Tensor],
    store: Store,
    fresh: bool,
    on_rows: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """`fidelity.evaluate` of one model on each text, and both caches."""
    facts = {
        "fidelity": [candidate.fingerprint, donor.donor.fingerprint],
        "device": candidate.opened.device,
        "rows": [[hashlib.sha256(ids.numpy().tobytes()).hexdigest(), *ids.shape] for ids in rows.values()],
    }
    found = None if fresh else store.load(facts)
    if found is None:
        reference = donor.model()
        model = candidate.opened.model() if candidate is not donor.donor else reference
        texts = []
        for text, ids in rows.items():
            told = partial(on_rows, f"{candidate.name}: {text}")
            texts.append(fidelity.evaluate(model, reference, ids, told))
        cache = [cache_size.measure_cache(each).elements_per_token for each in (reference, model)]
        found = {"texts": texts, "cache": cache}
        store.save(facts, found)
    return found
