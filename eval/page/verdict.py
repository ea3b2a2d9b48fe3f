"""The page's title and its verdict: the measured numbers in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..report.conversion_tables import method_title
from ..report.units import share

SAME_CACHE = 0.995  # a share of the donor's cache from here on reads as all of it


def title(result: Mapping[str, Any]) -> str:
    """What the page is about, by the names of its models."""
    donor, *others = (model["name"] for model in result["models"])
    if not others:
        return f"{donor}, evaluated"
    if len(others) == 1:
        return f"{others[0]} beside its donor {donor}"
    return f"{len(others)} conversions of {donor}"


def kind(model: Mapping[str, Any]) -> str:
    """donor; MLA, converted; MLA, healed."""
    method = model.get("method")
    return f"{method_title(str(method))}, {model['role']}" if method else str(model["role"])


def cache_shares(result: Mapping[str, Any]) -> list[float | None]:
    """Each model's KV cache over the donor's; None where it was not measured."""
    cache = result.get("cache") or [{}] * len(result["models"])
    held = [one.get("kv_elements_per_token") for one in cache]
    return [value / held[0] if value is not None and held[0] else None for value in held]


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base; None where either is not known or not finite, or the base is 0."""
    if value is None or not base or not math.isfinite(value / base):
        return None
    return value / base


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A sentence or three for each model after the donor: cache, perplexity, accuracy, retrieval."""
    models = result["models"]
    if len(models) == 1:
        return [f"{models[0]['name']} alone was measured; there is no conversion to compare with it."]
    shares = cache_shares(result)
    return [_of_model(result, index, shares[index]) for index in range(1, len(models))]


def _of_model(result: Mapping[str, Any], index: int, kept: float | None) -> str:
    name = f"{result['models'][index]['name']} ({kind(result['models'][index])})"
    facts = []
    if kept is not None:
        facts.append(
            f"keeps {share(kept)} of the KV cache" if kept < SAME_CACHE else "has the whole KV cache"
        )
    facts += _perplexity(result, index)
    said = [f"{name} {', and '.join(facts)}." if facts else f"{name}."]
    return " ".join(filter(None, [*said, _accuracy(result, index), _retrieval(result, index)]))


def _perplexity(result: Mapping[str, Any], index: int) -> list[str]:
    """What became of the perplexity on each text; nothing without texts."""
    finite: list[str] = []
    others: list[str] = []
    for text in result.get("texts") or ():
        times = ratio(*(text["models"][at].get("perplexity") for at in (index, 0)))
        if times is None:
            others.append(text["text"])
        else:
            donors = "" if finite else "the donor's "
            finite.append(f"{times:.3f} times {donors}on {text['text']}")
    said = [f"its perplexity is {' and '.join(finite)}"] if finite else []
    if not others:
        return said
    return [
        "; ".join([*said, f"{'it' if said else 'its perplexity'} is not finite on {' and '.join(others)}"])
    ]


def _accuracy(result: Mapping[str, Any], index: int) -> str:
    average = result.get("average")
    found = average["models"][index] if average else {}
    difference, stderr = found.get("difference"), found.get("difference_stderr")
    if not average or difference is None:
        return ""
    plural = "s" * (len(average["tasks"]) != 1)
    over = f"over {len(average['tasks'])} task{plural}"
    points = f"{100 * abs(difference):.1f} points" + (
        f" (± {100 * stderr:.1f})" if stderr is not None else ""
    )
    if not difference:
        return f"Its accuracy {over} is the donor's."
    moved = f"Its accuracy {over} is {points} {'above' if difference > 0 else 'below'} the donor's"
    if found.get("within_noise") is None:
        return f"{moved}."
    return moved + (
        ", which is inside the noise." if found["within_noise"] else ", which is more than noise."
    )


def _retrieval(result: Mapping[str, Any], index: int) -> str:
    found = (result.get("retrieval") or {}).get("models")
    if not found or not found[index] or not found[0]:
        return ""
    ours, theirs = (share(found[at]["share"]) for at in (index, 0))
    return f"It recalls {ours} of the numbers hidden in long text; the donor {theirs}."
