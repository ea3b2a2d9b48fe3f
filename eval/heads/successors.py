"""Heads that, where they look at one of an ordered row, write the next: "three" at "two" (arXiv 2312.09230).

Shapes: N layers, H query heads, I items, T tokens, D hidden, d of a head's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...convert.calibration.token_rows import start_of_text

ORDERS = (
    "one two three four five six seven eight nine ten eleven twelve",
    "0 1 2 3 4 5 6 7 8 9",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
)
LEAST_PAIRS = 8  # neighbours that are tokens of their own; with fewer the score says nothing


def successors(model: Any, tokenizer: Any) -> Tensor | None:
    """`successors_of` numbers, days, months and letters; None where too few of them are tokens of their own."""
    found = [[_token(tokenizer, word) for word in order.split()] for order in ORDERS]
    orders = [order for order in found if len({*order} - {None}) > 2]  # a pair alone has no others
    if sum(None not in pair for order in orders for pair in pairwise(order)) < LEAST_PAIRS:
        return None
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return successors_of(model, (start_of_text(tokenizer) or newline)[0], orders)


def successors_of(model: Any, first: int, orders: Sequence[Sequence[int | None]]) -> Tensor:
    """(N, H): the share of items at which a head, looking at one alone, adds more to the logit of the next than to that
    of any other of its row but itself. Chance is one in the others of a row.

    Each item is read behind `first`, and items of None are left out. What reaches the logits through later layers does
    not count.
    """
    rows = [{item for item in order if item is not None} for order in orders]
    items = sorted(set().union(*rows))
    place = {item: at for at, item in enumerate(items)}
    scores = []
    for written in _written(model, torch.tensor([[first, item] for item in items])):  # I H I
        hits = [
            _raised(
                written[place[item]], place[following], [place[each] for each in known - {item, following}]
            )
            for order, known in zip(orders, rows, strict=True)
            for item, following in pairwise(order)
            if item is not None and following is not None
        ]
        scores.append(torch.stack(hits).double().mean(0))
    return torch.stack(scores)


def _raised(logits: Tensor, following: int, others: Sequence[int]) -> Tensor:
    """(H,): whether the logit of `following` in (H, I) is above that of all `others`."""
    return logits[:, following] > logits[:, others].amax(1)


@torch.inference_mode()
def _written(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """(I, H, I) of each layer: what each head adds, but for a factor, to the logits of the items, where it looks at the
    second token of a row of ids (I, 2) alone.

    The model's attention implementation is "eager", which gives its weights.
    """
    heads: list[Tensor] = []
    weights: list[Tensor] = []
    layers, items = model.get_decoder().layers, ids[:, 1].to(model.device)
    hooks = [
        hook
        for layer in layers
        for hook in (
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: heads.append(given[0])),
            layer.self_attn.register_forward_hook(lambda _, __, output: weights.append(output[1])),
        )
    ]
    try:
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, mixed, attention in zip(layers, heads, weights, strict=True):
        values = mixed.unflatten(-1, (attention.shape[1], -1))  # I T H d
        share = (
            attention[:, :, 1, 0] / attention[:, :, 0, 0]
        )  # of the first token, which sees none but itself
        alone = values[:, 1] - share[..., None] * values[:, 0]
        outputs = layer.self_attn.o_proj.weight.unflatten(-1, alone.shape[1:])  # D H d
        states = torch.einsum("ihd,Dhd->ihD", alone, outputs)
        normed = model.get_decoder().norm(states)
        yield (normed @ model.get_output_embeddings().weight[items].T).float().cpu()


def _token(tokenizer: Any, word: str) -> int | None:
    """The token that is `word`, behind a space or without one; None where it has several."""
    for text in (f" {word}", word):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    return None
