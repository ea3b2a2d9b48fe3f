"""The YAML front matter of a model card, in the Hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from ..storage.bounded_yaml import load_yaml


def front_matter(
    *,
    library: str,
    base: str | None,
    relation: str,
    licence: str | None,
    tags: Sequence[str],
) -> str:
    """The front matter with its `---` lines, ending in a line break.

    Args:
        library: that loads the model.
        base: Hub id of the base model; without one the card states no relation.
        relation: to the base model, in the Hub's terms: adapter, merge, quantized, or finetune for everything else.
        licence: its id, or a JSON list of several.
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
        data["license"] = _parse_licence(licence)
    return render_front_matter(data)


def render_front_matter(data: ModelCardData) -> str:
    """`data` as YAML between `---` lines, ending in a line break."""
    return f"---\n{data.to_yaml()}\n---\n"


def _parse_licence(text: str) -> Any:
    """The licence, or a list for a string that holds a JSON list of several."""
    if not text.startswith("["):
        return text
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
