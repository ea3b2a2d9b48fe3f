"""The RoPE of one layer: some families rotate local layers with a different base than global ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerRotary:
    """The rotary embedding of one layer.

    Attributes:
        inv_freq: (rotary pairs,), radians per token.
        attention_scaling: YaRN's factor on cos and sin, otherwise 1.
        embeddings: cos and sin (1, L, rotary dim) of positions 0 … L − 1.
    """

    inv_freq: Tensor
    attention_scaling: float
    embeddings: tuple[Tensor, Tensor]


def layer_rotary(module: Any, config: Any, index: int, length: int) -> LayerRotary:
    """The RoPE that the donor's rotary `module` applies in layer `index`, on the module's device, float32."""
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[index] if layer_types else None
    by_type = hasattr(module, f"{layer_type}_inv_freq")
    prefix = f"{layer_type}_" if by_type else ""
    inv_freq = getattr(module, f"{prefix}inv_freq")
    positions = torch.arange(length, device=inv_freq.device).unsqueeze(0)
    like = torch.zeros(1, dtype=torch.float32, device=inv_freq.device)
    embeddings = module(like, positions, layer_type) if by_type else module(like, positions)
    return LayerRotary(inv_freq, float(getattr(module, f"{prefix}attention_scaling", 1.0)), embeddings)
