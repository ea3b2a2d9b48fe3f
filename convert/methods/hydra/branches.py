"""Hydra's branches on one linear layer, merging and conversion to LoRA: pure functions of tensors.

Shapes: o = out_features, i = in_features, r = a rank. A base layer is y0 = W x + b with W (o, i) and b (o).

    y  = y0 + s · B_p A_p x + s · B_s A_s y0
    W' = W + s · (B_p A_p + B_s A_s W)
    b' = b + s · B_s A_s b

Every delta is computed from the base weight, never from a merged one, so adapters add up in any order.

Source: Hydra, arXiv 2309.06922, and its code; b' follows from y0, which contains b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Branches:
    """One adapter on one layer.

    Attributes:
        scale: s.
        par: A_p (r, i) and B_p (o, r); None: there is no such branch.
        seq: A_s (r, o) and B_s (o, r); None: there is no such branch.
    """

    scale: float
    par: Pair | None = None
    seq: Pair | None = None

    @property
    def rank(self) -> int:
        """r_par + r_seq, an upper bound of the rank of W' − W."""
        return sum(len(pair[0]) for pair in (self.par, self.seq) if pair is not None)


def as_lora(weight: Tensor, adapter: Branches) -> Pair:
    """The LoRA with the same effect on W: down (rank, i) and up (o, rank) with scale · up @ down = W' − W.

    down = [A_p; A_s W], up = [B_p, B_s], in the adapter's dtype or the weight's, whichever is wider.
    """
    down, up = [], []
    if adapter.par is not None:
        down.append(adapter.par[0])
        up.append(adapter.par[1])
    if adapter.seq is not None:
        dtype = torch.promote_types(weight.dtype, adapter.seq[0].dtype)
        down.append(adapter.seq[0].to(dtype) @ weight.to(dtype))
        up.append(adapter.seq[1])
    return torch.cat(down), torch.cat(up, dim=1)


def weight_delta(weight: Tensor, adapter: Branches) -> Tensor:
    """W' − W (o, i) for the base weight W, in the wider dtype of the two."""
    with _no_autocast(weight):
        down, up = as_lora(weight, adapter)
        dtype = torch.promote_types(down.dtype, up.dtype)
        return adapter.scale * (up.to(dtype) @ down.to(dtype))


def bias_delta(bias: Tensor, adapter: Branches) -> Tensor:
    """b' − b (o) for the base bias b, which the sequential branch reads; zeros without that branch."""
    if adapter.seq is None:
        return torch.zeros_like(bias)
    down, up = adapter.seq
    dtype = torch.promote_types(bias.dtype, down.dtype)
    with _no_autocast(bias):
        return adapter.scale * (up.to(dtype) @ (down.to(dtype) @ bias.to(dtype)))


def merged_weight(weight: Tensor, adapters: Iterable[Branches]) -> Tensor:
    """A new tensor W' with every adapter merged, in the dtype of W.

    Summed in float32, or float64 where the weight or an adapter is; rounded once.
    """
    return _merged(weight, adapters, weight_delta)


def merged_bias(bias: Tensor, adapters: Iterable[Branches]) -> Tensor:
    """A new tensor b' with every adapter merged, as `merged_weight` does it."""
    return _merged(bias, adapters, bias_delta)


def _no_autocast(tensor: Tensor) -> Any:
    """A context without autocast on the tensor's device, so that products of float32 stay float32."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()


def _merged(own: Tensor, adapters: Iterable[Branches], delta: Callable[[Tensor, Branches], Tensor]) -> Tensor:
    """`own` with the deltas of `adapters` added one after the other in float32 or wider, back in its own dtype."""
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    result = wide.clone()
    for adapter in adapters:
        result = result + delta(wide, adapter)
    return result.to(own.dtype)
