"""Layers in 16-bit products, their attention too: for gradients and statistics of calibration text on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mhconvert.device import half_products

BLOCK = 128  # queries at a time, which meet no key behind them
LONGEST = 1024  # tokens of a row; of longer ones torch's kernel keeps less for a backward pass


@contextmanager
def half_layers(device: torch.device) -> Iterator[None]:
    """As `device.half_products`, attention included, which torch's kernel for a CPU computes no faster in 16 bits.

    Rows of 512 tokens take two thirds of its time, and half of it with a backward pass.
    """
    products = half_products(device)
    if device.type != "cpu" or not isinstance(products, torch.autocast):
        with products:
            yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _half_attention
    try:
        with products:
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # and there is torch's again


def _half_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" returns, by `causal_blocks` where that computes the same."""
    length, causal = query.shape[2], options.get("is_causal")
    named = {"dropout", "scaling", "is_causal", "sliding_window"}
    if (
        attention_mask is None
        and not options.get("dropout")
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and all(given is None for name, given in options.items() if name not in named)
        and length == key.shape[2] <= LONGEST
        and key.shape[1] == value.shape[1]
    ):
        scaling = options.get("scaling")
        return causal_blocks(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def causal_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention with products in bfloat16 and softmax in float32: (B, T, H, v), bfloat16.

    The relative squared error is 2e-5, that of the products. Heads that share a KV head meet it in one product.

    Args:
        query: (B, H, T, d); key: (B, G, T, d); value: (B, G, T, v).
    """
    length, groups, half = query.shape[2], key.shape[1], torch.bfloat16
    query = (query * scaling).to(half).unflatten(1, (groups, -1))  # B G H/G T d
    key, value = key.to(half), value.to(half)
    found = []
    for start in range(0, length, BLOCK):
        rows = query[:, :, :, start : start + BLOCK]
        size, stop = rows.shape[2:4], start + rows.shape[3]
        scores = (rows.flatten(2, 3) @ key[:, :, :stop].mT).unflatten(2, size)
        future = F.pad(torch.full((size[1], size[1]), -torch.inf).triu(1), (start, 0))
        weights = (scores.float() + future).softmax(-1).to(half)
        found.append((weights.flatten(2, 3) @ value[:, :, :stop]).unflatten(2, size))
    return torch.cat(found, dim=3).flatten(1, 2).transpose(1, 2).contiguous()
