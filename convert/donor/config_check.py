"""Checks a model's config before anything is built or allocated by it: ranges, and layers against the weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import weight_names, weights_present
from .config_ranges import NEVER_NULL, PARTS, PER_LAYER, RANGES, ROPE, ROPE_WORDS, WORDS, Range

SHOWN_CHARACTERS = 60
DEEPEST = 2  # a part of a part has no RoPE that is read
LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")


def require_config(values: Mapping[str, Any], folder: Path) -> None:
    """Check `values`, of the config.json in `folder`: their ranges, and the layers against the weights beside it.

    Raises:
        CheckpointError: as `require_ranges` and `require_layers`, or for an unreadable index of the weights.
    """
    file = folder / "config.json"
    require_ranges(values, file)
    if weights_present(folder):
        require_layers(values.get("num_hidden_layers"), weight_names(folder), file)


def require_ranges(values: Mapping[str, Any], file: Path, names: Mapping[str, str] | None = None) -> None:
    """Check the fields of a config, and those of its RoPE and of the parts of a multimodal one.

    Args:
        file: that states them, for messages.
        names: field -> its name in `file`, where that is another.

    Raises:
        CheckpointError: with the field, its value and what it may be.
    """
    for field, value, allowed in _faults(values, ""):
        text = json.dumps(value, default=str)
        text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
        raise CheckpointError(f"{file}: {(names or {}).get(field, field)}={text} is not {allowed}")


def require_layers(count: Any, names: Iterable[str], file: Path) -> None:
    """Raises CheckpointError where a config of `count` layers has more than the tensors `names`, which say how many."""
    numbers = [int(found[1]) for name in names if (found := LAYER.search(name))]
    if numbers and isinstance(count, int) and count > (stored := max(numbers) + 1):
        raise CheckpointError(
            f"{file} says that there are {count} layers, and its weights have tensors of {stored}; "
            "download the checkpoint again, or correct the number"
        )


def require_padding(config: Any, file: Path) -> None:
    """Raises CheckpointError where the padding token of a config, or of its class, is behind the vocabulary."""
    vocabulary, padding = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    way_out = "set pad_token_id to null, or to another token's id"
    if file.suffix == ".gguf":
        way_out = "use another file of this model, or its safetensors"
    if vocabulary and padding is not None and padding >= vocabulary:
        raise CheckpointError(
            f"{file} has pad_token_id={padding}, and with vocab_size={vocabulary} the last token is "
            f"{vocabulary - 1}, so that no model can be built; {way_out}"
        )


def _faults(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, str]]:
    """(field with its place, value, what it may be) of everything that is out of range in one mapping and below it."""
    rope = any(f"{name}." in place for name in ROPE)
    for name, value in values.items():
        field = f"{place}{name}"
        stated_else = name in ROPE_WORDS and any(values.get(word) is not None for word in ROPE_WORDS)
        if value is None and (stated_else or not (name in NEVER_NULL and rope)):
            continue
        length = name in RANGES and RANGES[name].whole
        if rope and length and isinstance(value, float) and value.is_integer():
            value = int(value)  # transformers takes 4096.0 here
        if name in RANGES:
            yield from _number_faults(field, value, RANGES[name])
        elif name in (*ROPE, *PARTS):
            if not isinstance(value, Mapping):
                yield field, value, "a mapping of settings"
            elif field.count(".") < DEEPEST:
                yield from _faults(value, f"{field}.")
        elif name in WORDS and (name not in ROPE_WORDS or rope):
            if not (isinstance(value, str) and value.removeprefix("torch.") in WORDS[name]):
                yield field, value, f"one of {', '.join(WORDS[name])}"
        elif rope and isinstance(value, Mapping):
            yield from _faults(value, f"{field}.")  # of one type of layer
        elif name == "architectures":
            if not (isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)):
                yield field, value, "a list of names of classes"
        elif isinstance(value, float) and not math.isfinite(value):
            yield field, value, "a finite number"
    yield from _unfitting(values, place)


def _number_faults(field: str, value: Any, allowed: Range) -> Iterator[tuple[str, Any, str]]:
    if not (allowed.lists and isinstance(value, list)):
        if not allowed.holds(value):
            yield field, value, allowed.words
        return
    for index, entry in enumerate(value):
        inner = entry if isinstance(entry, list) else [entry]
        for number in inner:
            if not allowed.holds(number):
                yield f"{field}[{index}]", number, allowed.words


def _unfitting(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, str]]:
    """Fields of one mapping, each in its range, that do not go with another of it."""
    layers = values.get("num_hidden_layers")
    for name in PER_LAYER if isinstance(layers, int) else ():
        stated = values.get(name)
        if isinstance(stated, list) and len(stated) != layers:
            yield f"{place}{name}", stated, f"a list with an entry for each of {layers} layers"
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width and heads and values.get("head_dim") is None and heads > width:
        yield f"{place}num_attention_heads", heads, f"a whole number from 1 to hidden_size={width}"
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        yield f"{place}high_freq_factor", high, f"above low_freq_factor={low}"
    experts, chosen = (
        values.get("num_local_experts", values.get("num_experts")),
        values.get("num_experts_per_tok"),
    )
    if experts and chosen is not None and not 1 <= chosen <= experts:
        yield (
            f"{place}num_experts_per_tok",
            chosen,
            f"a whole number from 1 to {experts}, the number of experts",
        )
