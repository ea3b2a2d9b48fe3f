"""The page's title and the summary of the results in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import refusal_counts
from ..report.conversion_tables import method_title
from ..report.units import share
from ..text_spread import MANY, counted
from ..text_spread import sentence as sentence_of_texts
from ..writing.verdict import sentence

SAME_CACHE = 0.995  # fraction of the donor's cache from which on it is called the whole cache


def title(result: Mapping[str, Any]) -> str:
    """The page's title, from the names of its models."""
    if result.get("left_out"):
        return f"{', '.join(model['name'] for model in result['models'])}, evaluated"
    donor, *others = (model["name"] for model in result["models"])
    if not others:
        return f"{donor}, evaluated"
    if len(others) == 1:
        return f"{others[0]} beside its donor {donor}"
    return f"{len(others)} conversions of {donor}"


def conversions(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models that are compared with the donor, which is the first; all models where the donor was left out."""
    return list(result["models"][0 if result.get("left_out") else 1 :])


def reference(result: Mapping[str, Any]) -> str:
    """What differences are from, in words: the donor, or the first model where the donor was left out."""
    return str(result["models"][0]["name"]) if result.get("left_out") else "the donor"


def kind(model: Mapping[str, Any]) -> str:
    """A model's method and role: "donor", "MLA, converted", "MLA, healed"."""
    method = model.get("method")
    return f"{method_title(str(method))}, {model['role']}" if method else str(model["role"])


def cache_shares(result: Mapping[str, Any]) -> list[float | None]:
    """Each model's KV cache as a fraction of the donor's; None if it was not measured."""
    caches = result.get("cache") or [{}] * len(result["models"])
    sizes = [cache.get("kv_elements_per_token") for cache in caches]
    return [size / sizes[0] if size is not None and sizes[0] else None for size in sizes]


def cache_tokens(result: Mapping[str, Any]) -> int | None:
    """Tokens in the caches of `cache_shares`; None where the shares are those of any number."""
    by_length = ((result.get("cache") or [{}])[0]).get("by_length")
    return int(list(by_length)[-1]) if by_length else None


def cache_length(result: Mapping[str, Any], index: int) -> str:
    """Where the share of one model's cache holds: "at 8,192 tokens, 41 % at 1,024"; "" where it does for any text.

    The share of a shorter text is named where it is another one.
    """
    tokens = cache_tokens(result)
    if tokens is None or not index:
        return ""
    own, donors = (result["cache"][at]["by_length"] for at in (index, 0))
    at_context, *shorter = [(length, share(own[length] / donors[length])) for length in reversed(own)]
    others = [f"{part} at {int(length):,}" for length, part in shorter if part != at_context[1]]
    return ", ".join([f"at {tokens:,} tokens", *others])


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base; None if either is unknown, the base is 0, or the quotient is not finite."""
    if value is None or not base or not math.isfinite(value / base):
        return None
    return value / base


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A paragraph on each model after the first: cache, perplexity, accuracy, probes, writing; who was left out."""
    models, left_out = result["models"], result.get("left_out") or ()
    missing = [f"{each['reference']} is left out: {each['why']}" for each in left_out]
    if len(models) == 1:
        alone = "" if missing else "; there is no conversion to compare with it"
        return [*missing, f"{models[0]['name']} alone was measured{alone}."]
    shares = cache_shares(result)
    return missing + [_model_summary(result, index, shares[index]) for index in range(1, len(models))]


def _model_summary(result: Mapping[str, Any], index: int, kept: float | None) -> str:
    """The paragraph on one model; `kept` is its KV cache as a fraction of the donor's."""
    name = f"{result['models'][index]['name']} ({kind(result['models'][index])})"
    clauses = []
    if kept is not None:
        clauses.append(
            f"keeps {share(kept)} of the KV cache {cache_length(result, index)}".rstrip()
            if kept < SAME_CACHE
            else "has the whole KV cache"
        )
    clauses += _perplexity(result, index)
    first = f"{name} {', and '.join(clauses)}." if clauses else f"{name}."
    probes = [_retrieval(result, index), _writing(result, index), _refusals(result, index)]
    return " ".join(filter(None, [first, _worse_texts(result, index), _accuracy(result, index), *probes]))


def _refusals(result: Mapping[str, Any], index: int) -> str:
    if not (found := result.get("refusals")):
        return ""
    return refusal_counts.sentence(found["models"][index], found["models"][0], found["requests"])


def _perplexity(result: Mapping[str, Any], index: int) -> list[str]:
    """A clause on the perplexity ratio on each text, or of many their mean and the worst; empty without texts."""
    if len(result.get("texts") or ()) >= MANY and result.get("over_texts"):
        return [_over_texts(result["over_texts"][index], len(counted(result["texts"])))]
    finite: list[str] = []
    others: list[str] = []
    for text in result.get("texts") or ():
        times = ratio(*(text["models"][at].get("perplexity") for at in (index, 0)))
        if times is None:
            others.append(text["text"])
        else:
            donors = "" if finite else "the donor's "
            finite.append(f"{times:.3f} times {donors}on {text['text']}")
    clauses = [f"its perplexity is {' and '.join(finite)}"] if finite else []
    if not others:
        return clauses
    return [
        "; ".join(
            [*clauses, f"{'it' if clauses else 'its perplexity'} is not finite on {' and '.join(others)}"]
        )
    ]


def _over_texts(found: Mapping[str, Any], texts: int) -> str:
    if found["ratio"] is None or found["worst_ratio"] is None:
        return f"its perplexity is not finite on {found['worst']}"
    mean = f"its perplexity is {found['ratio']:.3f} times the donor's in the mean of {texts} texts"
    return f"{mean}, at worst {found['worst_ratio']:.3f} times on {found['worst']}"


def _worse_texts(result: Mapping[str, Any], index: int) -> str:
    """A sentence on texts that are much worse than the others; empty without any."""
    words = sentence_of_texts(result["over_texts"][index]) if result.get("over_texts") else ""
    return f"{words[0].upper()}{words[1:]}." if words else ""


def _accuracy(result: Mapping[str, Any], index: int) -> str:
    """Sentences on the differences from the first model's accuracy: the average, and apart from it MMLU and each
    language; empty where they are unknown."""
    average = result.get("average")
    means = [("Its accuracy over", average)] if average else []
    means += [(f"On {mean['name']} alone, its accuracy over", mean) for mean in result.get("apart") or ()]
    return " ".join(filter(None, (_moved(result, subject, mean, index) for subject, mean in means)))


def _moved(result: Mapping[str, Any], subject: str, mean: Mapping[str, Any], index: int) -> str:
    scores, tasks = mean["models"][index], len(mean["tasks"])
    difference, stderr = scores.get("difference"), scores.get("difference_stderr")
    if difference is None:
        return ""
    over = f"{subject} {tasks} task{'s' * (tasks != 1)} is"
    points = f"{100 * abs(difference):.1f} points" + (
        f" (± {100 * stderr:.1f})" if stderr is not None else ""
    )
    if not difference:
        return f"{over} {reference(result)}'s."
    moved = f"{over} {points} {'above' if difference > 0 else 'below'} {reference(result)}'s"
    if scores.get("within_noise") is None:
        return f"{moved}."
    return moved + (
        ", which is inside the noise." if scores["within_noise"] else ", which is more than noise."
    )


def _retrieval(result: Mapping[str, Any], index: int) -> str:
    """A sentence on the recall from long text; empty if it was not measured."""
    scores = (result.get("retrieval") or {}).get("models")
    if not scores or not scores[index] or not scores[0]:
        return ""
    ours, theirs = (share(scores[at]["share"]) for at in (index, 0))
    return f"It recalls {ours} of the numbers hidden in long text; the donor {theirs}."


def _writing(result: Mapping[str, Any], index: int) -> str:
    """A sentence with the verdict on what it writes; empty if it was not measured."""
    found = result.get("generation")
    return f"In its own texts it {sentence(found['models'][index])}." if found else ""
