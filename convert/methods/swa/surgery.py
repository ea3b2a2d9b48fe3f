"""Attention that sees a window, and the sinks of its heads in closed form. Pure.

Shapes: B rows, T tokens, H query heads, G KV heads, d head_dim, D hidden_size.

A sink is a logit s of a head beside its scores, whose value is 0: the head's output is multiplied by
σ(lse − s), lse the logarithm of the sum of the exponentials of its scores.

Sources: attention sinks, arXiv 2309.17453; as a learnt logit, gpt-oss, arXiv 2508.10925.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .targets import NO_SINK

QUERIES = 256  # whose scores are in memory at once
STEPS = 30  # of Gauss-Newton, most of which a layer does not need


def blocks(
    query: Tensor, key: Tensor, window: int, scale: float, softcap: float | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The scores of a few queries at a time.

    Args:
        query: (B, H, T, d); key: (B, G, T, d), both behind RoPE.
        window: tokens that a query sees, itself included.

    Returns:
        Of each block: its queries, the keys that they may see, the scores (B, G, H/G, queries, keys), and which of
        these are in the window (queries, keys).
    """
    length, groups = query.shape[2], key.shape[1]
    position = torch.arange(length, device=query.device)
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        columns = slice(max(0, start - window + 1), rows.stop)
        grouped = query[:, :, rows].unflatten(1, (groups, -1))
        scores = grouped @ key[:, :, None, columns].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = position[rows, None] - position[columns]
        yield rows, columns, scores, (distance >= 0) & (distance < window)


def windowed(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention on a window without sinks.

    Returns:
        outputs (B, T, H, d), and lse (B, T, H), the logarithm of the sum of the exponentials of the scores.
    """
    outputs, sums = [], []
    for _, columns, scores, seen in blocks(query, key, window, scale, softcap):
        scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ value[:, :, None, columns]).flatten(1, 2))
        sums.append(scores.logsumexp(-1).flatten(1, 2))
    return torch.cat(outputs, dim=2).transpose(1, 2), torch.cat(sums, dim=2).transpose(1, 2)


def dropped(query: Tensor, key: Tensor, inside: Tensor, window: int, scale: float) -> Tensor:
    """(B, T, H), the logarithm of the sum of the exponentials of the scores that a window drops; T beyond the window.

    inside: (B, T, H) of `windowed`.
    """
    whole = [
        scores.masked_fill(~seen, -torch.inf).logsumexp(-1).flatten(1, 2)
        for _, _, scores, seen in blocks(query, key, query.shape[2], scale)
    ]
    every, kept = torch.cat(whole, dim=2).transpose(1, 2)[:, window:].double(), inside[:, window:].double()
    # log(eᵃ − eᵇ) = a + log(1 − e^(b − a)); a dropped mass of nothing is the smallest that float32 tells apart.
    return every + torch.log1p(-torch.exp((kept - every).clamp_max(-1e-7)))


class SinkFit:
    """‖Σ_h g_h P_h − y‖² over tokens, in the sinks s: g_h = σ(lse_h − s_h), P_h what head h adds, y the donor's output.

    Only products are kept: of each token Pᵀ P (H, H) and Pᵀ y (H).
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._products: list[Tensor] = []

    def add(self, heads: Tensor, sums: Tensor, output: Tensor, wanted: Tensor) -> None:
        """Count tokens.

        Args:
            heads: (T, H, d), outputs without sinks; sums: (T, H), their lse.
            output: (D, H, d), o_proj; wanted: (T, D), the donor's output without its bias.
        """
        for a, lse, y in zip(heads.split(QUERIES), sums.split(QUERIES), wanted.split(QUERIES), strict=True):
            added = torch.einsum("thd,Dhd->thD", a, output)
            self._squares.append((added @ added.mT).double().cpu())
            self._products.append((added @ y[..., None]).squeeze(-1).double().cpu())
            self._sums.append(lse.double().cpu())

    def solve(self, start: Tensor) -> Tensor:
        """The sinks (H,), by damped Gauss-Newton from `start`; NO_SINK for all where that is not better than none."""
        sums, squares, products = map(torch.cat, (self._sums, self._squares, self._products))

        def loss(sinks: Tensor) -> Tensor:
            gates = (sums - sinks).sigmoid()
            quadratic = torch.einsum("th,thk,tk->", gates, squares, gates)
            return quadratic - 2 * (gates * products).sum()

        none = torch.full_like(start.double(), NO_SINK)
        sinks, damping = start.double(), 1e-3
        best = loss(sinks)
        for _ in range(STEPS):
            gates = (sums - sinks).sigmoid()
            slopes = -gates * (1 - gates)
            gradient = (slopes * (torch.einsum("thk,tk->th", squares, gates) - products)).sum(0)
            curvature = torch.einsum("th,thk,tk->hk", slopes, squares, slopes)
            # A head whose gate does not move has no curvature: it is held where it is.
            diagonal = curvature.diagonal() + 1e-6 * curvature.diagonal().mean() + 1e-30
            step = torch.linalg.solve(curvature + torch.diag(damping * diagonal), gradient)
            tried = sinks - step.clamp(-4, 4)
            if (found := loss(tried)) < best:
                sinks, best, damping = tried, found, damping / 4
            else:
                damping *= 8
        return sinks if best < loss(none) else none
