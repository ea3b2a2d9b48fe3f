"""What calibration text says of one donor layer's attention; only moments and small histograms are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from mhconvert.convert.mla.surgery import AttentionWeights, LayerStatistics

ATTENTION_TOKENS = 4096  # whose attention weights are computed one by one; enough for both uses of them
ATTENDED_SHARE = 0.3  # of the key moment that counts tokens by the attention they get
MOMENT_BLOCK = 1 << 14  # tokens summed in float32 before the sum joins the float64 one


def attention_weights(attention: Any, config: Any) -> AttentionWeights:
    """The four projections of a donor's attention module as float64 tensors on the CPU."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def of(projection: nn.Linear) -> Tensor:
        return projection.weight.detach().to("cpu", torch.float64)

    return AttentionWeights(
        q=of(attention.q_proj).view(heads, head_dim, -1),
        k=of(attention.k_proj).view(kv_heads, head_dim, -1),
        v=of(attention.v_proj).view(kv_heads, head_dim, -1),
        o=of(attention.o_proj).view(-1, heads, head_dim),
    )


def observe(
    attention: Any,
    config: Any,
    inputs: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    inv_freq: Tensor,
    attention_scaling: float,
) -> LayerStatistics:
    """Statistics of one layer. inputs (N, L, D): the normalised attention inputs of N calibration rows.

    Keys are counted by the square of the attention they get, mixed with a plain mean: an error in a score moves
    the output by the attention weight, and a sink token (one in a row) takes most of it.
    """
    device = position_embeddings[0].device
    moment, mean = _moment(inputs, device)
    rows = inputs[: max(1, ATTENTION_TOKENS // inputs.shape[1])]
    attended, distances = _attention(attention, config, rows, position_embeddings)
    attended_moment, attended_mean = _moment(rows, device, attended)
    share = ATTENDED_SHARE
    angles = torch.outer(inv_freq.to("cpu", torch.float64), torch.arange(rows.shape[1], dtype=torch.float64))
    turns = torch.polar(torch.ones_like(angles), -angles)
    return LayerStatistics(
        query_moment=moment,
        key_moment=(1 - share) * moment + share * attended_moment,
        key_mean=(1 - share) * mean + share * attended_mean,
        phases=attention_scaling**2 * (distances.to(turns.dtype) @ turns.mT),
        rope_gain=attention_scaling**2,
    )


def _moment(inputs: Tensor, device: torch.device, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[x xᵀ] (D, D) and E[x] (D,), float64 on the CPU; weights (N, L) count tokens, None: all alike."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    counts = torch.ones(len(tokens)) if weights is None else weights.reshape(-1)
    counts = counts / counts.sum(dtype=torch.float64)
    width = tokens.shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64)
    mean = torch.zeros(width, dtype=torch.float64)
    for block, share in zip(tokens.split(MOMENT_BLOCK), counts.split(MOMENT_BLOCK), strict=True):
        x, w = block.to(device), share.to(device, torch.float32).unsqueeze(-1)
        moment += ((x * w).mT @ x).cpu().double()
        mean += (x * w).sum(0).cpu().double()
    return moment, mean


@torch.no_grad()
def _attention(
    attention: Any, config: Any, rows: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(N, L): squared attention that each token gets, over heads and queries; (H, L): attention by distance.

    The first token of a row is left out of the distances: as a sink it is read from anywhere.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    length, device = rows.shape[1], position_embeddings[0].device
    future = torch.full((length, length), -torch.inf, device=device).triu(1)
    total = torch.zeros(heads, length, length, device=device)
    received = []
    for row in rows:
        x = row.unsqueeze(0).to(device)
        q = attention.q_proj(x).view(1, length, -1, head_dim).transpose(1, 2)
        k = attention.k_proj(x).view(1, length, -1, head_dim).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        scores = (q @ repeat_kv(k, heads // k.shape[1]).mT).squeeze(0) * attention.scaling
        shares = scores.add_(future).softmax(-1)  # H L L
        total += shares
        received.append(shares.square_().sum((0, 1)).cpu())
    total[:, :, 0] = 0
    position = torch.arange(length, device=device)
    distance = (position[:, None] - position[None]).clamp_min(0).flatten()
    distances = torch.zeros(heads, length, device=device).index_add_(1, distance, total.flatten(1))
    distances = distances.cpu().double() + torch.finfo(torch.float64).tiny
    return torch.stack(received), distances / distances.sum(-1, keepdim=True)
