"""What calibration text says of one donor layer's attention; only moments and small histograms are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # the one that knows partial rotation

from ..families.facts import AttentionFacts, attention_facts, layer_window
from .projections import queries_and_keys
from .weights import LayerStatistics

ATTENTION_TOKENS = 4096  # whose attention weights are computed one by one; enough for both uses of them
ATTENDED_SHARE = 0.3  # of the key moment that counts tokens by the attention they get
MOMENT_BLOCK = 1 << 14  # tokens summed in float32 before the sum joins the float64 one
ENOUGH = 4  # tokens for each direction of x
UNSEEN_SHARE = 0.1  # of the energy, at most, spread over all directions where few tokens say nothing of some
LEAST_SPREAD = 1e-4  # at any rate: many tokens may be few different ones, and in layer 0 that is all they are


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
    device, facts = position_embeddings[0].device, attention_facts(config)
    moment, mean = _moment(inputs, device)
    missing = max(0.0, 1 - inputs[..., 0].numel() / (ENOUGH * inputs.shape[-1]))
    unseen = max(LEAST_SPREAD, UNSEEN_SHARE * missing)
    rows = inputs[: max(1, ATTENTION_TOKENS // inputs.shape[1])]
    window = layer_window(config, attention.layer_idx)
    attended, distances = _attention(attention, facts, window, rows, position_embeddings)
    attended_moment, attended_mean = _moment(rows, device, attended)
    share, gain = ATTENDED_SHARE, attention_scaling**2
    key_moment = _spread((1 - share) * moment + share * attended_moment, unseen)
    moment = _spread(moment, unseen)
    key_mean = (1 - share) * mean + share * attended_mean
    if facts.input_bias:
        moment, mean = _with_one(moment, mean)
        key_moment, key_mean = _with_one(key_moment, key_mean)
    angles = torch.outer(inv_freq.to("cpu", torch.float64), torch.arange(rows.shape[1], dtype=torch.float64))
    turns = torch.polar(torch.ones_like(angles), -angles)
    phases = gain * (distances.to(turns.dtype) @ turns.mT)
    fixed = (
        facts.head_dim - facts.rotary_dim
    ) // 2  # pairs that RoPE leaves alone: a constant of 1 replaces it
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
    whole = torch.cat((mean, one))
    return torch.cat((torch.cat((moment, mean.unsqueeze(0))), whole.unsqueeze(1)), dim=1), whole


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
    attention: Any,
    facts: AttentionFacts,
    window: int | None,
    rows: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """(N, L): squared attention that each token gets, over heads and queries; (H, L): attention by distance.

    The first token of a row is left out of the distances: as a sink it is read from anywhere.
    """
    length, device = rows.shape[1], position_embeddings[0].device
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    hidden = (distance < 0) | (distance >= (window or length))
    total = torch.zeros(facts.heads, length, length, device=device)
    received = []
    for row in rows:
        q, k = queries_and_keys(attention, facts, row.unsqueeze(0).to(device))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        scores = (q @ repeat_kv(k, facts.heads // facts.kv_heads).mT).squeeze(0) * facts.scale
        if facts.softcap is not None:
            scores = torch.tanh(scores / facts.softcap) * facts.softcap
        shares = scores.masked_fill_(hidden, -torch.inf).softmax(-1)  # H L L
        total += shares
        received.append(shares.square_().sum((0, 1)).cpu())
    total[:, :, 0] = 0
    distances = torch.zeros(facts.heads, length, device=device)
    distances.index_add_(1, distance.clamp_min(0).flatten(), total.flatten(1))
    distances = distances.cpu().double() + torch.finfo(torch.float64).tiny
    return torch.stack(received), distances / distances.sum(-1, keepdim=True)
