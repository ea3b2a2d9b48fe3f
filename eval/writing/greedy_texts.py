"""The greedy texts themselves, as a result has them: each beside the donor's, no longer than people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .continuations import Text
from .prompts import Prompt
from .text_figures import first_difference
from .writing_figures import Divergence

PROMPT_LIMIT, TEXT_LIMIT = 500, 2000  # characters of a prompt and of a text that are kept


def asked(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts."""
    return [_shortened(prompt.text, PROMPT_LIMIT) for prompt in prompts]


def plain(tokenizer: Any, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """text: what each says."""
    said = (tokenizer.decode(text["tokens"], skip_special_tokens=True) for text in texts)
    return [{"text": _shortened(text, TEXT_LIMIT)} for text in said]


def beside(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], divergences: Sequence[Divergence]
) -> list[dict[str, Any]]:
    """Our texts with same_characters, the first of both that are equal; and same_tokens before the first that differs,
    None for equal texts."""
    found: list[dict[str, Any]] = []
    for our, their, divergence in zip(ours, theirs, divergences, strict=True):
        at = first_difference(our["text"], their["text"])
        same = len(our["text"]) if at is None else at
        found.append(our | {"same_characters": same, "same_tokens": divergence.at})
    return found


def without_texts(generation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`generation` of a result without prompts and texts: what is kept with a checkpoint, which others may read."""
    if generation is None:
        return None
    models = [
        {name: value for name, value in each.items() if name != "texts"} for each in generation["models"]
    ]
    return {name: value for name, value in generation.items() if name != "asked"} | {"models": models}


def _shortened(text: str, limit: int) -> str:
    """The first `limit` characters, and … where there are more."""
    return text if len(text) <= limit else f"{text[:limit]}…"
