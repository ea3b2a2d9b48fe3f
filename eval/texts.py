"""Fidelity of several models to one donor on several texts, and the measured sizes of their caches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import cache_size, fidelity
from .result_cache import Store
from .tasks.candidate import Candidate, LazyModel
from .tasks.harness import OnRows
from .text_spread import over_texts


def measure(
    donor: LazyModel,
    others: Sequence[Candidate],
    rows: Mapping[str, Tensor],
    store: Store,
    *,
    kinds: Mapping[str, str],
    fresh: bool,
    on_rows: OnRows,
) -> dict[str, Any]:
    """Fidelity in float32, with at most two models in memory, the donor and one other.

    Args:
        donor, others: the models.
        rows: token ids (sequences, sequence_length) of each text, by the text's name.
        store: keeps results between runs.
        kinds: of the texts of a suite, by their names.
        fresh: measures everything anew.
        on_rows: called with the model and text, the rows done and the rows in all.

    Returns:
        texts: kind, of a suite's; perplexity, kl and top1_agreement of every model on each text, and of all but the
        donor ratio (of the perplexities) and standard errors, None where not finite; over_texts: see there; cache:
        kv_elements_per_token of every model and, where it depends on the length of a text, by_length, tokens →
        elements, the last of which it is; None without texts.
    """
    if not rows:
        return {"texts": [], "over_texts": None, "cache": None}
    lengths = cache_size.lengths([each.opened for each in (donor.candidate, *others)])
    results = [
        _measure_model(each, donor, rows, lengths, store, fresh, on_rows)
        for each in others or [donor.candidate]
    ]
    texts = []
    for index, (text, ids) in enumerate(rows.items()):
        of_text = [result["texts"][index] for result in results]
        models = [{"perplexity": of_text[0]["perplexity"]["donor"], "kl": 0.0, "top1_agreement": 1.0}]
        for measured in of_text if others else []:
            figures = {name: measured[name] for name in ("kl", "kl_stderr", "top1_agreement")}
            models.append({"perplexity": measured["perplexity"]["converted"]} | figures | _ratio(measured))
        shape = {"sequences": ids.shape[0], "sequence_length": ids.shape[1]}
        kind = {"kind": kinds[text]} if text in kinds else {}
        texts.append({"text": text, **kind, **shape, "tokens": of_text[0]["tokens"], "models": models})
    caches = [results[0]["cache"][0], *(result["cache"][1] for result in results if others)]
    return {
        "texts": texts,
        "over_texts": over_texts(texts),
        "cache": [_cache(elements, lengths) for elements in caches],
    }


def _cache(elements: Sequence[float], lengths: Sequence[int]) -> dict[str, Any]:
    """The figures of one model's cache, at the last of `lengths` where there are any."""
    by_length = {str(length): each for length, each in zip(lengths, elements, strict=False)}
    return {"kv_elements_per_token": elements[-1]} | ({"by_length": by_length} if lengths else {})


def _ratio(measured: dict[str, Any]) -> dict[str, float | None]:
    """ratio: converted ÷ donor perplexity; ratio_stderr: that of its logarithm, times it; None where not finite."""
    theirs, ours = measured["perplexity"]["donor"], measured["perplexity"]["converted"]
    if not math.isfinite(theirs) or not math.isfinite(ours):
        return {"ratio": None, "ratio_stderr": None}
    ratio, stderr = ours / theirs, measured["log_ratio_stderr"]
    return {"ratio": ratio, "ratio_stderr": None if stderr is None else ratio * stderr}


def _measure_model(
    candidate: Candidate,
    donor: LazyModel,
    rows: Mapping[str, Tensor],
    lengths: Sequence[int],
    store: Store,
    fresh: bool,
    on_rows: OnRows,
) -> dict[str, Any]:
    """`fidelity.evaluate` of one model on each text, and the cache elements per token of the donor and the model, as
    `cache_size.elements_per_token` gives them."""
    key = {
        "fidelity": [candidate.fingerprint, donor.candidate.fingerprint],
        "device": candidate.opened.device,
        "stretch": fidelity.STRETCH,
        **candidate.cache_key(),
        **({"cache_lengths": list(lengths)} if lengths else {}),
        "rows": [[hashlib.sha256(ids.numpy().tobytes()).hexdigest(), *ids.shape] for ids in rows.values()],
    }
    result = None if fresh else store.load(key)
    if result is None:
        model = candidate.load() if candidate is not donor.candidate else donor.model
        texts = [
            fidelity.evaluate(model, donor.model, ids, partial(on_rows, f"{candidate.name}: {text}"))
            for text, ids in rows.items()
        ]
        cache = [
            cache_size.elements_per_token(each, lengths, of.kv_cache_dtype)
            for each, of in ((donor.model, donor.candidate), (model, candidate))
        ]
        result = {"texts": texts, "cache": cache}
        store.save(key, result)
    return result
