"""Prompts that are longer than a model reads: their middle is left out, as LongBench (arXiv 2308.14508) does."""

from __future__ import annotations

from torch import Tensor


def ends_of(tokens: list[int], limit: int) -> list[int]:
    """The tokens, or of more than `limit` ≥ 1 the first and the last, half of each."""
    if len(tokens) <= limit:
        return tokens
    first = limit // 2
    return tokens[:first] + tokens[first - limit :]


def without_middle(ids: Tensor, mask: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """ids and mask (rows, limit) of those (rows, length ≥ limit) that are padded on the left, each row by `ends_of`."""
    kept = ids[:, -limit:].clone()
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > limit:
            kept[row] = kept.new_tensor(ends_of(ids[row, -length:].tolist(), limit))
    return kept, mask[:, -limit:]
