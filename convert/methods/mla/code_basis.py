"""The transform of a layer's coder: keys before RoPE and values, decorrelated in the metric of what errors cost. Pure.

Shapes: y [k; v] of all KV heads of a layer, m = 2 G d elements; n components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import roots
from ..layer_sensitivity import LayerSensitivity

RIDGE = 0.1  # of the mean price of keys or values, added to every one: prices are estimated from few tokens
TINY = 1e-20


@dataclass(frozen=True)
class CodeBasis:
    """A layer's transform, its components ordered by `divergence`, the largest first.

    Attributes:
        down: (m, m), z = down @ (y − mean), of variance 1.
        up: (m, m), y − mean = up @ z.
        divergence: (m,), nats per token that leaving out a component adds.
    """

    down: Tensor
    up: Tensor
    divergence: Tensor


def code_basis(layer: LayerSensitivity) -> CodeBasis:
    """The Karhunen-Loève transform of y in the metric of the price.

    A component's error then costs its variance, whatever the others' are, which is what makes bits divide by
    water-filling. Source: transform coding, V. K. Goyal, IEEE Signal Processing Magazine 18(5), 2001.
    """
    root, inverse = roots(_ridged(layer.price))
    covariance = layer.moment - torch.outer(layer.mean, layer.mean)
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    values, vectors = values.flip(0).clamp_min(TINY), vectors.flip(1)
    scale = values.sqrt()
    return CodeBasis((vectors / scale).mT @ root, inverse @ vectors * scale, values / 2)


def _ridged(price: Tensor) -> Tensor:
    """`price` and a share of the mean price of keys, or of values: directions that few tokens priced are not free."""
    half = len(price) // 2
    means = price.diagonal().view(2, half).mean(1, keepdim=True).expand(2, half).flatten()
    return price + torch.diag(RIDGE * means.clamp_min(TINY))
