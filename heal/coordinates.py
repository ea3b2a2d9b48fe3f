"""Coordinates for the fit in which the inputs of a linear map are of more equal size.

A gradient step moves a weight most where its input is large; the directions of hidden states differ in size by
factors of hundreds. With W = W' R and R = C^(−1/4), C = E[x xᵀ] of the inputs, steps are taken on W': half-way to
white inputs, which is where a fit of a few hundred steps came closest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POWER = 0.25
DAMPING = 1e-2  # of the mean energy: for directions that the inputs hardly have
TOKENS = 4096  # that C is taken from


@dataclass(frozen=True)
class Coordinates:
    """R (n, n), symmetric, and its inverse. of_input: for the maps that read the layer's own input."""

    root: Tensor
    inverse: Tensor
    of_input: bool


@torch.no_grad()
def linear_coordinates(
    attention: nn.Module, inputs: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> dict[Tensor, Coordinates]:
    """By weight, for the linear maps in `attention` on `inputs` (N, L, D); all that read the input share one."""
    device = position_embeddings[0].device
    moments: dict[Tensor | None, Tensor] = {}  # None: of the input
    weights: dict[Tensor, Tensor | None] = {}

    def record(module: Any, arguments: tuple[Tensor, ...]) -> None:
        key = None if arguments[0] is row else module.weight
        weights[module.weight] = key
        x = arguments[0].flatten(0, -2)
        if key is not None:
            moments[key] = moments.get(key, 0) + x.mT @ x

    hooks = [m.register_forward_pre_hook(record) for m in attention.modules() if isinstance(m, nn.Linear)]
    for row in inputs[: max(1, TOKENS // inputs.shape[1])].to(device).split(1):
        moments[None] = moments.get(None, 0) + row[0].mT @ row[0]
        attention(row, position_embeddings)
    for hook in hooks:
        hook.remove()
    found = {key: _coordinates(moment, of_input=key is None) for key, moment in moments.items()}
    return {weight: found[key] for weight, key in weights.items()}


def _coordinates(moment: Tensor, of_input: bool) -> Coordinates:
    """From the second moment (n, n) of a map's inputs; its scale does not matter."""
    exact = moment.cpu().double()
    exact = exact / exact.diagonal().mean().clamp_min(torch.finfo(exact.dtype).tiny)
    values, vectors = torch.linalg.eigh(exact + DAMPING * torch.eye(len(exact), dtype=exact.dtype))

    def power(exponent: float) -> Tensor:
        return ((vectors * values.pow(exponent)) @ vectors.mT).to(moment)

    return Coordinates(power(-POWER), power(POWER), of_input)
