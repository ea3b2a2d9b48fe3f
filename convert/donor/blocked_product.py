"""The product with a head's weights, a block of the vocabulary at a time: in float32 a head is as large as layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_BLOCK = 1 << 14  # rows of the output embedding that are cast to float32 at a time


class _BlockedProduct(torch.autograd.Function):
    """x (..., n) and weight (rows, n) -> x weightᵀ (..., rows). Backward makes the blocks again and keeps none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stored: torch.dtype) -> Tensor:
        ctx.weight, ctx.stored = weight, stored
        return torch.cat([F.linear(x, block) for block in _blocks(weight, stored, x)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        parts = gradients[0].split(HEAD_BLOCK, dim=-1)
        blocks = _blocks(ctx.weight, ctx.stored, gradients[0])
        found: Any = sum(part @ block for part, block in zip(parts, blocks, strict=True))
        return found, None, None


def _blocks(weight: Tensor, stored: torch.dtype, like: Tensor) -> Iterator[Tensor]:
    return (block.to(stored).to(like.device, torch.float32) for block in weight.split(HEAD_BLOCK))


def blocked_product(x: Tensor, weight: Tensor, stored: torch.dtype) -> Tensor:
    """x (..., n) float32, weight (rows, n) rounded to `stored` -> (..., rows) float32 on the device of x.

    Gradients reach x alone.
    """
    product: Tensor = _BlockedProduct.apply(x, weight, stored)
    return product
