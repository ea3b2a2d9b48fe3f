"""The projections of a donor's attention module as float64 tensors, and its queries and keys before RoPE.

Shapes: H query heads, G KV heads, d head_dim, D hidden_size. A bias becomes one more column of its matrix, for an
input [x; 1]. Where RoPE rotates only a part of a head, rows are reordered so that (i, i + d / 2) is always a pair: the
rotary pairs first, then pairs of elements that are not rotated, which are treated as rotary pairs of frequency 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.facts import AttentionFacts
from .weights import AttentionWeights

LARGE = 1e3  # an input to an RMS norm for which its epsilon makes no difference in float32


@dataclass(frozen=True)
class QKNorm:
    """The gains of a donor's RMS norms of queries and keys: q (H, d), k (G, d), float64."""

    q: Tensor
    k: Tensor


def attention_weights(attention: Any, facts: AttentionFacts) -> AttentionWeights:
    """The projections of a donor's attention module as float64 tensors on the CPU, without QK-norm.

    Returns:
        q (H, d, D), k and v (G, d, D), o (D, H, d). With biases, q, k and v have D + 1 columns. Rows of q and k are in
        the order of `rotary_order`.
    """
    order = rotary_order(facts)
    (q, k, v), o = projections(attention, facts), attention.o_proj

    def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = weight.detach().to("cpu", torch.float64)
        if facts.input_bias:
            column = matrix.new_zeros(len(matrix)) if bias is None else bias.detach().cpu().double()
            matrix = torch.cat((matrix, column.unsqueeze(1)), dim=1)
        return matrix.unflatten(0, (-1, facts.head_dim))

    return AttentionWeights(
        q=rows(*q)[:, order],
        k=rows(*k)[:, order],
        v=rows(*v),
        o=o.weight.detach().to("cpu", torch.float64).unflatten(1, (facts.heads, facts.head_dim)),
    )


def output_bias(attention: Any) -> Tensor:
    """The bias of o_proj (D,), float64 on the CPU; zeros where it has none."""
    o = attention.o_proj
    return (o.weight.new_zeros(len(o.weight)) if o.bias is None else o.bias).detach().cpu().double()


def qk_norm(attention: Any, facts: AttentionFacts) -> QKNorm | None:
    """The gains of a donor's QK-norm, in the row order of `attention_weights`; None where it has none."""
    if facts.qk_norm is None:
        return None
    order = rotary_order(facts)

    def gains(norm: nn.Module, heads: int) -> Tensor:
        width = facts.head_dim * (heads if facts.qk_norm == "width" else 1)
        device = next(norm.parameters()).device
        gain = norm(torch.full((width,), LARGE, device=device)).detach().cpu().double()
        return gain.view(-1, facts.head_dim).expand(heads, -1)[:, order]

    return QKNorm(gains(attention.q_norm, facts.heads), gains(attention.k_norm, facts.kv_heads))


def queries_and_keys(attention: Any, facts: AttentionFacts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, d) and keys (B, G, T, d) of x (B, T, D) before RoPE, in the donor's own row order."""
    (q, k, _) = projections(attention, facts)
    query, key = F.linear(x, *q), F.linear(x, *k)
    if facts.qk_norm == "width":
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.unflatten(-1, (-1, facts.head_dim)), key.unflatten(-1, (-1, facts.head_dim))
    if facts.qk_norm == "head":
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2)


def rotary_order(facts: AttentionFacts) -> Tensor:
    """(d,), the donor's row index for each row of a half-split head with the rotary pairs first."""
    rows, rotary = torch.arange(facts.head_dim), facts.rotary_dim
    first, second = rows[:rotary].chunk(2)
    third, fourth = rows[rotary:].chunk(2) if rotary < facts.head_dim else (rows[:0], rows[:0])
    return torch.cat((first, third, second, fourth))


Projection = tuple[Tensor, Tensor | None]


def projections(attention: Any, facts: AttentionFacts) -> tuple[Projection, Projection, Projection]:
    """(weight, bias) of q, k and v, which some families fuse into one matrix `qkv_proj`."""
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj
        sizes = [facts.head_dim * heads for heads in (facts.heads, facts.kv_heads, facts.kv_heads)]
        biases = (None,) * 3 if fused.bias is None else fused.bias.split(sizes)
        q, k, v = zip(fused.weight.split(sizes), biases, strict=True)
        return q, k, v
    q, k, v = ((p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    return q, k, v
