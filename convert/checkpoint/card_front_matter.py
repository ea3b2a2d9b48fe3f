"""The YAML at the top of a model card, in the form that the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData


def front_matter(
    *,
    library: str,
    base: str | None,
    relation: str,
    licence: str | None,
    tags: Sequence[str],
) -> str:
    """`---`, YAML, `---`, and a line break. base: the base model's Hub id; without one no relation is claimed.

    relation: what the Hub calls it: adapter, merge, quantized or finetune, which is everything else.
    """
    data = ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(tags),
    )
    if base:
        data["base_model_relation"] = relation
    if licence:
        data["license"] = _licence(licence)
    return enclosed(data)


def enclosed(data: ModelCardData) -> str:
    """Return `data` as a card's front matter."""
    return f"---\n{data.to_yaml()}\n---\n"


def _licence(stated: str) -> Any:
    """Return a donor's licences as a list; several are stored as a JSON list in one string."""
    if not stated.startswith("["):
        return stated
    try:
        return yaml.safe_load(stated)
    except yaml.YAMLError:
        return stated
