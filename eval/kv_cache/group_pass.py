"""A forward pass that takes the tokens of one group of 32 at a time.

Keys are coded when their group is full, so a token that is generated reads the keys of its own group as they are. Taken
group by group, the tokens of a prompt or of an evaluated row do too: the logits are those of a token by token pass, and
no token's keys depend on tokens behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import MhconvertError

from .codes import GROUP

OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")  # (B, T, …)
WHOLE = ("labels", "output_hidden_states", "output_attentions")  # what only a pass at once gives


def in_groups(forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """`forward` of `inputs`, which have a cache, with the logits of all parts; the rest is the last part's.

    Raises:
        MhconvertError: the inputs ask for what is not put together from parts.
    """
    given = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    assert isinstance(given, Tensor)
    length, seen = given.shape[1], int(inputs["past_key_values"].get_seq_length())
    spans = list(_spans(seen, length))
    if len(spans) == 1:
        return forward(**inputs)
    mask = inputs.get("attention_mask")
    refused = [name for name in WHOLE if inputs.get(name) is not None and inputs[name] is not False]
    refused += ["an attention_mask of four dimensions"] if mask is not None and mask.dim() != 2 else []
    refused += ["a list of logits_to_keep"] if isinstance(inputs.get("logits_to_keep"), Tensor) else []
    if refused:
        raise MhconvertError(
            f"a coded KV cache reads a row in groups of {GROUP} tokens, without {refused[0]}"
        )
    keep = inputs.get("logits_to_keep") or length
    logits: list[Tensor] = []
    for start, stop in spans:
        part = inputs | {
            name: inputs[name][:, start:stop] for name in OF_TOKENS if inputs.get(name) is not None
        }
        if mask is not None:
            part["attention_mask"] = mask[:, : mask.shape[1] - length + stop]
        wanted = stop - max(start, length - keep)  # of the last `keep` of all
        if "logits_to_keep" in inputs:
            part["logits_to_keep"] = max(1, wanted)
        output = forward(**part)
        logits += [output.logits[:, -wanted:]] if wanted > 0 else []
    output.logits = torch.cat(logits, dim=1)
    return output


def _spans(seen: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the tokens of each group, of `length` tokens behind `seen` others."""
    start = 0
    while start < length:
        stop = min(length, start + GROUP - (seen + start) % GROUP)
        yield start, stop
        start = stop
