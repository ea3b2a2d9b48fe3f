"""A donor's weights under transformers' names, checked against its config."""

from __future__ import annotations

from typing import Any

from ..families.facts import Family
from .reference import ResolvedReference
from .tensor_layout import LM_HEAD, TensorLayout
from .tensor_names import TransformersNames

SHOWN = 3  # names in a notice


def open_checked(
    resolved: ResolvedReference, config: Any, family: Family
) -> tuple[TransformersNames, TensorLayout, list[str]]:
    """The weights, their layout, and sentences for the user about them. Errors as of `Donor.source`.

    Two different tensors for a head and an embedding that the config ties stay two, as transformers loads them;
    `config` then says so.
    """
    layout = TensorLayout(config, family)
    source, notices = TransformersNames(resolved.open_source(), layout), []
    if layout.stores_two_embeddings(source):
        config.tie_word_embeddings = False
        layout = TensorLayout(config, family)
        notices.append(f"{LM_HEAD} differs from the embedding, so that they are not tied as the config says")
    # A GGUF file holds what llama.cpp computes with, and nothing beside it.
    aside = layout.check(source, resolved.weights_path, surplus=resolved.header is None)
    if aside:
        more = f" and {len(aside) - SHOWN} more" if len(aside) > SHOWN else ""
        names = ", ".join(aside[:SHOWN]) + more
        notices.append(f"left aside, as {type(layout.model).__name__} has no place for it: {names}")
    return source, layout, notices
