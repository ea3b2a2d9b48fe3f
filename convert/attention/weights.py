"""A layer's attention as data: what every surgery starts from. Pure, float64.

Shapes: H query heads, G KV heads, d head_dim, F = d / 2 rotary frequencies, D hidden_size. Pair (i, i + F) of a head is
one complex number, which RoPE multiplies by exp(iθt); the score at distance Δ is Re Σ conj(q) exp(−iθΔ) k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """A donor layer: q (H, d, D), k (G, d, D), v (G, d, D), o (D, H, d), all float64; y = W x."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @property
    def group(self) -> Tensor:
        """(H,) which KV head each query head reads."""
        heads, kv_heads = self.q.shape[0], self.k.shape[0]
        return torch.arange(heads) // (heads // kv_heads)


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one layer's attention input x. float64.

    query_moment (D, D) = E[x xᵀ] over tokens. key_moment (D, D) and key_mean (D,): the same and E[x] with each
    token counted by how much an error in its key shows in the layer's output: a sink token, one in a row, takes
    most of the attention. rope_gain: what the donor's RoPE multiplies every score by, 1 but for YaRN;
    (F,) where it turns only some of the pairs.
    phases (H, F) complex: rope_gain · E[exp(−iθΔ)] over the distances that each head attends over, which is the
    constant that best replaces RoPE in a component.
    """

    query_moment: Tensor
    key_moment: Tensor
    key_mean: Tensor
    phases: Tensor
    rope_gain: float | Tensor = 1.0


def complex_pairs(weight: Tensor) -> Tensor:
    """(heads, d, D) real, half-split RoPE layout -> (F, heads, D) complex."""
    half = weight.shape[1] // 2
    return torch.complex(weight[:, :half], weight[:, half:]).transpose(0, 1)


def second_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """E[y yᵀ] of y = weight · x: weight (heads, d, D) -> (heads, d, heads, d)."""
    rows = weight.flatten(0, 1)
    return (rows @ moment @ rows.mT).view(*weight.shape[:2], *weight.shape[:2])


def pair_moments(weight: Tensor, moment: Tensor) -> Tensor:
    """E[z zᴴ] over heads in each frequency, z the complex pairs of weight (heads, d, D) · x -> (F, heads, heads)."""
    full = second_moment(weight, moment).unflatten(3, (2, -1)).unflatten(1, (2, -1))  # h 2 F g 2 F
    same = full.diagonal(0, 2, 5)  # h 2 g 2 F: both of one frequency
    parts = torch.complex(same[:, 0, :, 0] + same[:, 1, :, 1], same[:, 1, :, 0] - same[:, 0, :, 1])
    return parts.permute(2, 0, 1)
