"""Statistics of one donor layer's attention on calibration text: second moments and histograms of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # supports partial rotation

from ..families.facts import AttentionFacts, attention_facts, layer_window
from .projections import queries_and_keys
from .weights import LayerStatistics

ATTENTION_TOKENS = 4096  # attention weights are computed for at most so many tokens (or one row)
ATTENDED_SHARE = 0.3  # weight of the attention-weighted moment in the key moment
MOMENT_BLOCK = 1 << 14  # tokens summed in float32 before the sum is added in float64
ENOUGH_TOKENS = 4  # per direction of x; with fewer tokens, more of the energy is spread
LARGEST_SPREAD = (
    0.1  # share of the energy spread evenly over all directions, some of which few tokens do not show
)
LEAST_SPREAD = 1e-4  # even with many tokens, of which only few may be distinct, above all in layer 0


def observe(
    attention: Any,
    config: Any,
    inputs: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    inv_freq: Tensor,
    attention_scaling: float,
) -> LayerStatistics:
    """Statistics of one layer on N calibration rows of L tokens.

    In the key moment tokens are weighted by the square of the attention they get, mixed with equal weights: an error in
    a score changes the output in proportion to the attention weight, and a single sink token gets most of it.

    Args:
        attention: the donor's attention module.
        config: the donor's config.
        inputs: (N, L, D), the normalised inputs of the attention.
        position_embeddings: cos and sin (1, L, rotary dim).
        inv_freq: (rotary pairs,), radians per token.
        attention_scaling: YaRN's factor on cos and sin.
    """
    device, facts = position_embeddings[0].device, attention_facts(config)
    moment, mean = _moment(inputs, device)
    missing = max(0.0, 1 - inputs[..., 0].numel() / (ENOUGH_TOKENS * inputs.shape[-1]))
    spread = max(LEAST_SPREAD, LARGEST_SPREAD * missing)
    rows = inputs[: max(1, ATTENTION_TOKENS // inputs.shape[1])]
    window = layer_window(config, attention.layer_idx)
    attended, distances = _attention(attention, facts, window, rows, position_embeddings)
    attended_moment, attended_mean = _moment(rows, device, attended)
    share, gain = ATTENDED_SHARE, attention_scaling**2
    key_moment = _spread((1 - share) * moment + share * attended_moment, spread)
    moment = _spread(moment, spread)
    key_mean = (1 - share) * mean + share * attended_mean
    if facts.input_bias:
        moment, mean = _with_one(moment, mean)
        key_moment, key_mean = _with_one(key_moment, key_mean)
    angles = torch.outer(inv_freq.to("cpu", torch.float64), torch.arange(rows.shape[1], dtype=torch.float64))
    rotations = torch.polar(torch.ones_like(angles), -angles)
    phases = gain * (distances.to(rotations.dtype) @ rotations.mT)
    fixed = (facts.head_dim - facts.rotary_dim) // 2  # pairs that RoPE does not rotate, with phase 1
    return LayerStatistics(
        query_moment=moment,
        key_moment=key_moment,
        key_mean=key_mean,
        phases=torch.cat((phases, phases.new_ones(len(phases), fixed)), dim=1),
        rope_gain=gain if not fixed else torch.tensor([gain] * len(inv_freq) + [1.0] * fixed).double(),
    )


def _spread(moment: Tensor, share: float) -> Tensor:
    """`moment` with a share of its energy spread evenly over all directions."""
    even = moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return (1 - share) * moment + share * even


def _with_one(moment: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment and mean of [x; 1] from those of x."""
    one = torch.ones(1, dtype=mean.dtype)
    extended = torch.cat((mean, one))
    return torch.cat((torch.cat((moment, mean.unsqueeze(0))), extended.unsqueeze(1)), dim=1), extended


def _moment(inputs: Tensor, device: torch.device, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[x xᵀ] (D, D) and E[x] (D,), float64 on the CPU, with tokens weighted by `weights` (N, L) or equally."""
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
    attention: Any,
    facts: AttentionFacts,
    window: int | None,
    rows: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The attention that tokens get, and the distances over which heads attend.

    Returns:
        (N, L), the sum over heads and queries of the squared attention weights of each token; (H, L), float64, the
        share of each head's attention at each distance, without the first token of a row, the usual sink.
    """
    length, device = rows.shape[1], position_embeddings[0].device
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    masked = (distance < 0) | (distance >= (window or length))
    total = torch.zeros(facts.heads, length, length, device=device)
    received = []
    for row in rows:
        q, k = queries_and_keys(attention, facts, row.unsqueeze(0).to(device))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        scores = (q @ repeat_kv(k, facts.heads // facts.kv_heads).mT).squeeze(0) * facts.scale
        if facts.softcap is not None:
            scores = torch.tanh(scores / facts.softcap) * facts.softcap
        probabilities = scores.masked_fill_(masked, -torch.inf).softmax(-1)  # H L L
        total += probabilities
        received.append(probabilities.square_().sum((0, 1)).cpu())
    total[:, :, 0] = 0
    distances = torch.zeros(facts.heads, length, device=device)
    distances.index_add_(1, distance.clamp_min(0).flatten(), total.flatten(1))
    distances = distances.cpu().double() + torch.finfo(torch.float64).tiny
    return torch.stack(received), distances / distances.sum(-1, keepdim=True)
