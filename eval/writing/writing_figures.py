"""The figures of a model's texts beside those of its donor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..fidelity import perplexity
from .continuations import Judged, Text
from .differences import Values, beside, error, mean, paired
from .prompts import Prompt
from .text_figures import YES_OR_NO, figures
from .verdict import drift_tokens, verdict

Figures = dict[str, Values]  # by name, of each prompt's text


@dataclass(frozen=True)
class Divergence:
    """Where a greedy text leaves the donor's.

    Attributes:
        at: tokens that are the same before; None for equal texts.
        log_prob: in the donor, of the token written there; None where the text has no more.
    """

    at: int | None
    log_prob: float | None


def of_texts(prompts: Sequence[Prompt], tokenizer: Any, texts: Sequence[Text]) -> Figures:
    """The figures of each text, by name."""
    found = [
        figures(
            text["tokens"],
            text["ended"],
            tokenizer.decode(text["tokens"], skip_special_tokens=True),
            prompt.format,
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return {name: [each[name] for each in found] for name in found[0]}


def with_nats(of: Figures, texts: Sequence[Text], read: Sequence[Text] | Sequence[Judged]) -> Figures:
    """The figures, and `nats` a token that the donor gives each text."""
    pairs = zip(read, texts, strict=True)
    return of | {"nats": [each["nats"] / len(text["tokens"]) for each, text in pairs]}


def donor_figures(greedy: Figures, sampled: Figures, again: Figures) -> dict[str, Any]:
    """greedy, sampled: name -> value; of sampled also the difference of the texts `again`, of another seed."""
    return {
        "greedy": {name: {"value": mean(values)} for name, values in greedy.items()},
        "sampled": {
            name: {"value": mean(values), "another_seed": mean(paired(again[name], values))}
            for name, values in sampled.items()
        },
        "perplexity": perplexity(mean(sampled["nats"]) or 0.0, 1),
    }


def compared(
    prompts: Sequence[Prompt],
    ours: dict[str, Figures],
    theirs: dict[str, Figures],
    kl: Sequence[Sequence[float]],
    divergences: Sequence[Divergence],
    asked_otherwise: str | None,
) -> dict[str, Any]:
    """The figures of a converted model, and the verdict.

    Args:
        prompts: what was asked.
        ours: greedy and sampled of the model.
        theirs: of the donor, and again, of another seed.
        kl: KL(model ‖ donor) at each token of the model's sampled texts.
        divergences: of the greedy texts.
        asked_otherwise: how the model's prompts differ from the donor's.

    Returns:
        greedy, sampled: name -> `beside` of the donor's. kl, kl_stderr: nats a token, the mean of the texts' means;
        kl_by: kind and language -> the same of its prompts. perplexity: the donor's, on the model's sampled texts.
        length_ratio: of sampled texts, to the donor's. divergence: tokens, the median of texts that leave the donor's;
        equal, the share of those that do not; log_prob, the mean. drift_tokens, verdict, words, notes: see `verdict`.
    """
    means = [sum(costs) / len(costs) for costs in kl]
    spread = {
        name: abs(mean(paired(theirs["again"][name], theirs["sampled"][name])) or 0.0)
        for name in ours["sampled"]
    }
    sampled, greedy = (
        {
            name: beside(values, theirs[how][name], spread[name], yes_or_no=name in YES_OR_NO)
            for name, values in ours[how].items()
        }
        for how in ("sampled", "greedy")
    )
    found = {
        "greedy": greedy,
        "sampled": sampled,
        "kl": mean(means),
        "kl_stderr": error(means),
        "kl_by": {field: _by(prompts, field, means) for field in ("kind", "language")},
        "perplexity": perplexity(sampled["nats"]["value"], 1),
        "length_ratio": _ratio(ours["sampled"]["tokens"], theirs["sampled"]["tokens"]),
        "divergence": _divergence(divergences),
        "drift_tokens": drift_tokens(kl),
    }
    return found | verdict(found, asked_otherwise)


def _ratio(ours: Values, theirs: Values) -> float | None:
    ours_mean, theirs_mean = mean(ours), mean(theirs)
    return ours_mean / theirs_mean if ours_mean is not None and theirs_mean else None


def _by(prompts: Sequence[Prompt], field: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean value by the prompts' kind or language; {} where no prompt says it."""
    names = dict.fromkeys(name for prompt in prompts if (name := getattr(prompt, field)))
    return {
        name: mean(
            [value for prompt, value in zip(prompts, values, strict=True) if getattr(prompt, field) == name]
        )
        for name in names
    }


def _divergence(found: Sequence[Divergence]) -> dict[str, Any]:
    left = [each.at for each in found if each.at is not None]
    return {
        "tokens": statistics.median(left) if left else None,
        "equal": 1 - len(left) / len(found),
        "log_prob": mean([each.log_prob for each in found]),
    }
