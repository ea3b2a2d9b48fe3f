"""One layer's RoPE: some families turn their local layers by another base than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerRotary:
    """inv_freq: radians a token, one for each rotary pair; attention_scaling: YaRN's factor on cos and sin.

    embeddings: cos and sin (1, L, rotary width) of positions 0 … L − 1.
    """

    inv_freq: Tensor
    attention_scaling: float
    embeddings: tuple[Tensor, Tensor]


def layer_rotary(module: Any, config: Any, index: int, length: int) -> LayerRotary:
    """What the donor's rotary `module` does in layer `index`, on the module's device, float32."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else None
    by_kind = hasattr(module, f"{kind}_inv_freq")
    prefix = f"{kind}_" if by_kind else ""
    inv_freq = getattr(module, f"{prefix}inv_freq")
    positions = torch.arange(length, device=inv_freq.device).unsqueeze(0)
    like = torch.zeros(1, dtype=torch.float32, device=inv_freq.device)
    embeddings = module(like, positions, kind) if by_kind else module(like, positions)
    return LayerRotary(inv_freq, float(getattr(module, f"{prefix}attention_scaling", 1.0)), embeddings)
