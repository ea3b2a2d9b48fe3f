"""Where heads look: at the needle that is to be copied, at the token before, at earlier copies and behind them.

Shapes: N layers, H query heads, T tokens. Sources: retrieval heads, arXiv 2404.15574; induction heads, arXiv
2209.11895.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...convert.calibration.token_rows import start_of_text
from ..needle_text import Case

REPEATED = 48  # random tokens, which stand in the text twice
Score = Callable[[Tensor], Tensor]


@torch.inference_mode()
def attention_scores(model: Any, ids: Sequence[int], score: Score) -> Tensor:
    """(N, kinds, H): what `score` makes of each layer's attention weights (H, T, T), (kinds, H); one layer at a time.

    The model's attention implementation is "eager", which gives its weights.
    """
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, __, output: found.append(score(output[1][0].float()).cpu().double())
        )
        for layer in model.get_decoder().layers
    ]
    try:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def needle(case: Case) -> int | None:
    """The position of the answer's first token in the text before the question; None where it is cut otherwise."""
    ids, answer = case.ids, case.ids[-case.answer :]
    places = range(len(ids) - 2 * case.answer, -1, -1)
    return next((at for at in places if ids[at : at + case.answer] == answer), None)


def retrieval(
    model: Any, cases: Sequence[Case], on_case: Callable[[], object] = lambda: None
) -> Tensor | None:
    """(N, 2, H): how often a head looks most at the token that is to be copied next, and its attention to it.

    Means over the answers' tokens of all cases, which are read as they are, whether or not the model would write them.
    None where no case has its answer in the text, token by token.
    """
    scores = []
    for case in cases:
        if (at := needle(case)) is not None:
            copied = _copied(len(case.ids) - case.answer - 1, at, case.answer)
            scores.append(attention_scores(model, case.ids, copied))
        on_case()
    return torch.stack(scores).mean(0) if scores else None


def _copied(reading: int, at: int, count: int) -> Score:
    """The score of `count` positions from `reading` on, which are to copy the tokens from `at` on."""

    def score(weights: Tensor) -> Tensor:
        rows = weights[:, reading : reading + count]
        copied = torch.arange(at, at + count, device=weights.device)
        most = rows.argmax(-1) == copied
        mass = rows.gather(2, copied.expand(len(rows), -1)[..., None]).squeeze(2)
        return torch.stack((most.float().mean(1), mass.mean(1)))

    return score


def repetition(model: Any, tokenizer: Any, seed: int) -> Tensor:
    """(N, 3, H): attention to the token before; and in a repeated text of random tokens, to the same token's first
    occurrence, and to the token behind that, which comes next (induction)."""
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    ordinary = torch.tensor(sorted(set(range(known)) - set(tokenizer.all_special_ids)))
    drawn = torch.randint(len(ordinary), (REPEATED,), generator=torch.Generator().manual_seed(seed))
    once = ordinary[drawn].tolist()
    return repetition_of(model, [*start_of_text(tokenizer), *once, *once], len(once))


def repetition_of(model: Any, ids: Sequence[int], period: int) -> Tensor:
    """As `repetition`, of ids whose last 2 · `period` tokens are one text twice."""

    def score(weights: Tensor) -> Tensor:
        before = weights.diagonal(-1, 1, 2).mean(1)
        second = weights[:, -period:]  # H period T
        first = weights.shape[2] - 2 * period
        same, behind = (second.diagonal(first + shift, 1, 2)[:, :period].mean(1) for shift in (0, 1))
        return torch.stack((before, same, behind))

    return attention_scores(model, ids, score)
