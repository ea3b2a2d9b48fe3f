"""The attention weights and calibration statistics of one layer, from which every surgery starts. Float64.

Shapes: H query heads, G KV heads, d head_dim, F = d / 2 rotary frequencies, D hidden_size. Pair (i, i + F) of a head is
one complex number, which RoPE multiplies by exp(iθt) at position t; the score at distance Δ is
Re Σ conj(q) exp(−iθΔ) k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of a donor layer: q (H, d, D), k and v (G, d, D), o (D, H, d); y = W x.

    weight: (H,), of errors that each head reads where they are weighed against each other's; 1: all alike.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    weight: Tensor | float = 1.0

    @property
    def group(self) -> Tensor:
        """(H,), the KV head that each query head reads."""
        heads, kv_heads = self.q.shape[0], self.k.shape[0]
        return torch.arange(heads) // (heads // kv_heads)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's attention input x on the calibration text.

    Attributes:
        query_moment: (D, D) = E[x xᵀ] over tokens.
        key_moment: (D, D) = E[x xᵀ] with each token weighted by how much an error in its key changes the layer's
            output; a single sink token gets most of the attention.
        key_mean: (D,) = E[x] with the same weights.
        phases: (H, F) complex = rope_gain · E[exp(−iθΔ)] over the distances at which each head attends; the constant
            that best replaces RoPE in a component.
        rope_gain: the donor's RoPE multiplies scores by it, 1 without YaRN; (F,) where RoPE rotates only some pairs.
    """

    query_moment: Tensor
    key_moment: Tensor
    key_mean: Tensor
    phases: Tensor
    rope_gain: float | Tensor = 1.0


def complex_pairs(weight: Tensor) -> Tensor:
    """Rows in half-split RoPE layout (heads, d, D) -> complex rows (F, heads, D)."""
    half = weight.shape[1] // 2
    return torch.complex(weight[:, :half], weight[:, half:]).transpose(0, 1)


def second_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """(heads, d, heads, d) = E[y yᵀ] of y = weight · x, for weight (heads, d, D) and moment (D, D) = E[x xᵀ]."""
    rows = weight.flatten(0, 1)
    return (rows @ moment @ rows.mT).view(*weight.shape[:2], *weight.shape[:2])


def pair_moments(weight: Tensor, moment: Tensor) -> Tensor:
    """(F, heads, heads) = E[z zᴴ] in each frequency; z is weight · x as complex pairs, for weight (heads, d, D)."""
    full = second_moment(weight, moment).unflatten(3, (2, -1)).unflatten(1, (2, -1))  # h 2 F g 2 F
    same = full.diagonal(0, 2, 5)  # h 2 g 2 F: pairs of the same frequency
    parts = torch.complex(same[:, 0, :, 0] + same[:, 1, :, 1], same[:, 1, :, 0] - same[:, 0, :, 1])
    return parts.permute(2, 0, 1)
