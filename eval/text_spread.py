"""One model on several texts: its mean, its worst, and texts on which it is much worse than on the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MANY = 3  # texts, from which on one of them can be told from the others
# A text is much worse whose ln(perplexity ÷ donor's) is beyond the mean of the others' by as much as that is, and by:
LEAST = 0.05  # nats, 5 % of perplexity
ERRORS = 3.0  # standard errors


def counted(texts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `texts` of a result that are told of together: those of a suite, which have a kind, or all where none has."""
    return [text for text in texts if text.get("kind")] or list(texts)


def over_texts(texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Of each model on the `counted` texts of a result together; None for fewer than two.

    Returns:
        ratio: the geometric mean of its perplexities ÷ the donor's; kl: the mean; worst: the name of the text with the
        largest ratio, None for the donor; worst_ratio: that, 1 for the donor; worse: the texts that are much worse
        than the others, with ratio and others, the others' geometric mean. Ratios are None where not finite.
    """
    texts = counted(texts)
    if len(texts) < 2:
        return None
    return [_of_model(texts, index) for index in range(len(texts[0]["models"]))]


def _of_model(texts: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
    found = [text["models"][index] for text in texts]
    kl = sum(each["kl"] for each in found) / len(found)
    if index == 0:
        return {"ratio": 1.0, "kl": kl, "worst": None, "worst_ratio": 1.0, "worse": []}
    ratios = [_ratio(text, index) for text in texts]
    sizes = [math.inf if ratio is None else ratio for ratio in ratios]
    worst = sizes.index(max(sizes))
    return {
        "ratio": _mean(ratios),
        "kl": kl,
        "worst": texts[worst]["text"],
        "worst_ratio": ratios[worst],
        "worse": _worse([text["text"] for text in texts], ratios, [_log_error(each) for each in found]),
    }


def _worse(
    names: Sequence[str], ratios: Sequence[float | None], errors: Sequence[float | None]
) -> list[dict[str, Any]]:
    """The texts of which the constants above hold; a text without an error bar is not judged."""
    worse = []
    for at, (name, ratio, error) in enumerate(zip(names, ratios, errors, strict=True)):
        others = _mean([*ratios[:at], *ratios[at + 1 :]])
        rest = [each for other, each in enumerate(errors) if other != at]
        if len(names) < MANY or ratio is None or others is None or error is None or None in rest:
            continue
        noise = math.hypot(error, math.hypot(*(each or 0.0 for each in rest)) / len(rest))
        more, usual = math.log(ratio / others), math.log(others)
        if more > max(LEAST, usual, ERRORS * noise):
            worse.append({"text": name, "ratio": ratio, "others": others})
    return worse


def sentence(model: Mapping[str, Any]) -> str:
    """What is said of the texts that are much worse, beginning with their names; empty without any."""
    return "; ".join(
        f"{each['text']} is much worse than the other texts, by more than noise: perplexity × {each['ratio']:.3f} "
        f"beside × {each['others']:.3f}"
        for each in model["worse"]
    )


def _ratio(text: Mapping[str, Any], index: int) -> float | None:
    theirs, ours = text["models"][0].get("perplexity"), text["models"][index].get("perplexity")
    finite = theirs and ours and math.isfinite(theirs) and math.isfinite(ours)
    return ours / theirs if finite else None


def _log_error(found: Mapping[str, Any]) -> float | None:
    stderr, ratio = found.get("ratio_stderr"), found.get("ratio")
    return None if stderr is None or not ratio else stderr / ratio


def _mean(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean; None where a ratio is not finite."""
    if None in ratios:
        return None
    return math.exp(sum(math.log(each) for each in ratios if each) / len(ratios))
