"""What predictions lose when heads are left out: measured, or estimated for all heads at once from gradients.

A head is left out by a factor of 0 on what it gives to o_proj. KL(p ‖ p without it) is measured by a forward pass for
each head; to second order it is half the Fisher information of that factor, E (∂ log p(token) / ∂ factor)² over tokens
drawn from p, which one backward pass a draw gives for all heads together.

Shapes: N layers, H query heads, T tokens. Ships, the KL of the next token over prompts, is from arXiv 2410.13708.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...convert.calibration.token_rows import random_ids
from ..fidelity import divergences

TOGETHER_TOKENS = 512  # rows of so many tokens in all, each without other heads, go through the model at once

Head = tuple[int, int]  # (layer, head)


@dataclass(frozen=True)
class Texts:
    """Rows of token ids, each (T,), and whether only the prediction behind the last token counts."""

    rows: Sequence[Tensor] | Tensor
    last: bool


def shape(model: Any) -> tuple[int, int]:
    """(N, H)."""
    text = model.config.get_text_config()
    return int(text.num_hidden_layers), int(text.num_attention_heads)


@contextmanager
def gated(model: Any, gates: Tensor) -> Iterator[None]:
    """Multiplies what each head gives to o_proj by gates (B or 1, N, H), as long as the context lasts."""

    def hook(index: int) -> Callable[..., tuple[Tensor]]:
        def scale(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            of_layer = gates[:, index]  # B H
            heads = arguments[0].unflatten(-1, (of_layer.shape[1], -1))  # B T H d
            return ((heads * of_layer[:, None, :, None].to(heads.dtype)).flatten(2),)

        return scale

    layers = model.get_decoder().layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(hook(index)) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def predictions(model: Any, ids: Tensor, last: bool) -> Tensor:
    """Logits (B, T, vocab_size) of ids (B, T), or with `last` (B, 1, vocab_size); float32."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=int(last)).logits
    return logits.float()


def estimated(
    model: Any, texts: Texts, samples: int, seed: int, on_row: Callable[[], object] = lambda: None
) -> Tensor:
    """(N, H): the KL that leaving out each head alone would make, nats a prediction, to second order."""
    generator = torch.Generator().manual_seed(seed)
    total, count = torch.zeros(shape(model), dtype=torch.float64), 0
    model.requires_grad_(False)
    for row in texts.rows:
        gates = torch.ones(1, *shape(model), device=model.device, requires_grad=True)
        with torch.enable_grad(), gated(model, gates):
            logits = predictions(model, row[None], texts.last)[0]
        probabilities = logits.detach().softmax(-1)
        count += len(logits)
        for drawn in random_ids(probabilities, generator, samples).split(1, dim=1):
            behind = probabilities.neg().scatter_add_(1, drawn, probabilities.new_ones(len(drawn), 1))
            [gradient] = torch.autograd.grad(logits, gates, behind, retain_graph=True)
            total += gradient[0].cpu().double().square()
        on_row()
    return total / (2 * samples * count)


@torch.inference_mode()
def measured(
    model: Any,
    texts: Texts,
    sets: Sequence[Sequence[Head]],
    on_row: Callable[[], object] = lambda: None,
) -> list[float]:
    """KL(p ‖ p without the heads of a set), nats a prediction, for each of `sets`."""
    total, count = torch.zeros(len(sets), dtype=torch.float64), 0
    gates = torch.ones(len(sets), *shape(model), device=model.device)
    for index, heads in enumerate(sets):
        for layer, head in heads:
            gates[index, layer, head] = 0
    for row in texts.rows:
        whole = predictions(model, row[None], texts.last).log_softmax(-1)
        count += whole.shape[1]
        together = max(1, TOGETHER_TOKENS // len(row))
        for part, sums in zip(gates.split(together), total.split(together), strict=True):
            with gated(model, part):
                left = predictions(model, row.expand(len(part), -1), texts.last).log_softmax(-1)
            sums += divergences(whole, left).sum(1)
        on_row()
    return (total / count).tolist()


def greedy_set(
    model: Any,
    texts: Texts,
    candidates: Sequence[Head],
    alone: Sequence[float],
    size: int,
    on_row: Callable[[], object] = lambda: None,
) -> list[tuple[Head, float]]:
    """Heads whose absence together changes predictions most: each next one is what adds most to those before.

    Args:
        candidates: among which they are looked for; alone: the KL without each of them.
        size: how many.

    Returns:
        (head, KL without it and those before it).  Source: Sahara, arXiv 2410.13708, section 4.
    """
    found: list[tuple[Head, float]] = []
    left, scores = list(candidates), list(alone)
    while left and len(found) < size:
        best = max(range(len(left)), key=scores.__getitem__)
        found.append((left.pop(best), scores[best]))
        chosen = [head for head, _ in found]
        if left and len(found) < size:
            scores = measured(model, texts, [[*chosen, head] for head in left], on_row)
    return found
