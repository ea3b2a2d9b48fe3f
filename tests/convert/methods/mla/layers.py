"""Random attention layers in float64 for the surgery, and what a converted one computes as plain forms."""

from __future__ import annotations

import torch
from torch import Tensor

from mhconvert.convert.attention.weights import AttentionWeights, LayerStatistics
from mhconvert.convert.methods.mla.surgery import LatentWeights

HEADS, WIDTH, HIDDEN = 4, 8, 24


def random_weights(kv_heads: int, seed: int = 0) -> AttentionWeights:
    """4 heads of width 8 on a hidden size of 24; the heads differ in scale."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        scale = torch.linspace(0.3, 2, shape[0], dtype=torch.float64).view(-1, 1, 1)
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return AttentionWeights(
        q=draw(HEADS, WIDTH, HIDDEN),
        k=draw(kv_heads, WIDTH, HIDDEN),
        v=draw(kv_heads, WIDTH, HIDDEN),
        o=draw(HIDDEN, HEADS, WIDTH),
    )


def random_rows(seed: int = 0, count: int = 200) -> Tensor:
    """(count, HIDDEN) tokens of unequal directions and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    rows = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    return rows @ mixing + 0.5 * torch.randn(HIDDEN, generator=generator, dtype=torch.float64)


def random_statistics(seed: int = 0, gain: float = 1.0) -> LayerStatistics:
    """Plain moments of `random_rows`; phases anywhere in the disk of radius `gain`."""
    rows, generator = random_rows(seed), torch.Generator().manual_seed(seed + 2000)
    moment = rows.mT @ rows / len(rows)
    radius, angle = torch.rand(2, HEADS, WIDTH // 2, generator=generator, dtype=torch.float64)
    return LayerStatistics(moment, moment, rows.mean(0), torch.polar(gain * radius, 7 * angle), gain)


def nope_width(latent: LatentWeights) -> int:
    """Elements of a head's key without RoPE."""
    return latent.query_map.shape[1] - 2 * len(latent.frequencies)


def nope_forms(latent: LatentWeights) -> Tensor:
    """(H, D, D): the score without RoPE of head h is x_qᵀ form[h] x_k."""
    rank, width = latent.kv_b_proj.shape[1], nope_width(latent)
    up = latent.kv_b_proj.view(HEADS, width + WIDTH, rank)[:, :width]
    queries = latent.q_proj.view(HEADS, -1, HIDDEN)[:, :width]
    return queries.mT @ up @ latent.kv_a_proj_with_mqa[:rank]


def rope_forms(latent: LatentWeights) -> Tensor:
    """(H, R, D, D) complex: the score of one rotary component at distance Δ is Re x_qᵀ form exp(−iθΔ) x_k."""
    keys = latent.kv_a_proj_with_mqa[len(latent.kv_a_proj_with_mqa) - 2 * len(latent.frequencies) :]
    queries = latent.q_proj.view(HEADS, -1, HIDDEN)[:, nope_width(latent) :]
    q = torch.complex(queries[:, ::2], queries[:, 1::2])
    k = torch.complex(keys[::2], keys[1::2])
    return q.conj().unsqueeze(-1) * k.unsqueeze(-2)


def value_forms(latent: LatentWeights) -> Tensor:
    """(H, D, D): what head h adds to the output for a token that it reads with all its attention."""
    rank = latent.kv_b_proj.shape[1]
    up = latent.kv_b_proj.view(HEADS, -1, rank)[:, -WIDTH:]
    out = latent.o_proj.view(HIDDEN, HEADS, WIDTH).transpose(0, 1)
    return out @ up @ latent.kv_a_proj_with_mqa[:rank]
