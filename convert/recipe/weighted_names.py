"""Names with weights, as a command line and a recipe write them."""

from __future__ import annotations

from collections.abc import Sequence

from mhconvert.errors import HealError

from ..validation.check import shown

TERMS = ("kl", "ce", "hidden", "balance")  # of the loss


def alike(names: str | Sequence[str]) -> dict[str, float]:
    """{"books.txt": 1.0, "self": 1.0} from ["books.txt", "self"]; one name may stand alone. Raises HealError."""
    words = [names] if isinstance(names, str) else names
    for word in words:
        if not isinstance(word, str):
            raise HealError(f"{shown(word)} is not text")
    return dict.fromkeys(words, 1.0)


def sources(words: Sequence[str]) -> dict[str, float]:
    """{"books.txt": 2.0, "self": 1.0} from the words ["books.txt=2", "self"] of a command line."""
    return {name: 1.0 if share is None else share for name, share in map(weighted, words)}


def weighted(text: str) -> tuple[str, float | None]:
    """("books.txt", 2.0) from "books.txt=2"; None where no weight is given."""
    name, equals, weight = text.strip().rpartition("=")
    try:
        return (name, float(weight)) if equals else (text.strip(), None)
    except ValueError:
        return text.strip(), None


def loss_terms(text: str) -> dict[str, float]:
    """{"kl": 1.0, "ce": 0.1} from "kl=1,ce=0.1"; a term without a weight has 1. Raises HealError."""
    return require_terms(sources(text.split(",")))


def require_terms(loss: dict[str, float]) -> dict[str, float]:
    """Return the weights of loss terms. Raises HealError for a term that there is not."""
    for term in loss:
        if term not in TERMS:
            raise HealError(f"loss has no term '{term}'; it has {', '.join(TERMS)}")
    return loss
