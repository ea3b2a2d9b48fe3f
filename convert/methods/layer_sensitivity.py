"""What errors in one layer's keys and values cost the donor's predictions, as a survey measures it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FIRST_TOKENS = 4  # of each row, which are left out of all moments: models park their attention on them
SAMPLE_TOKENS = 2048  # of the first text that is counted, whose keys and values are kept as they are
CLIPPED = 0.98  # quantile of the gradients' norms over tokens at which they are clipped: a few would be most of the sum


@dataclass(frozen=True)
class LayerSensitivity:
    """Moments of one layer's keys (before RoPE) and values y [k; v], m = 2 G d elements; float64, the price float32.

    Attributes:
        mean: (m,), E[y].
        covariance: (m, m), E[(y − mean)(y − mean)ᵀ].
        price: (m, m), E[g gᵀ], g = ∂ log p(token drawn from the model) / ∂y: the model's Fisher information, so that an
            error e of one token's y adds ½ eᵀ price e nats to the model's divergence, to second order.
        tokens: (), how many the moments are of, int64.
        first: (m,), the mean of y at the first position of a row, which the moments leave out; float64.
        sample: (at most SAMPLE_TOKENS, m), y of some of the tokens, float32.
        replaced_cost: (), what the method's other kind of layer in its place alone adds, such as one with a window,
            nats per token, where a method asks for it; float64.
    """

    mean: Tensor
    covariance: Tensor
    price: Tensor
    tokens: Tensor
    first: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    sample: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    replaced_cost: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


def weighted(layer: LayerSensitivity, weights: Tensor) -> LayerSensitivity:
    """`layer` where errors in the keys and values of the G KV heads count `weights` (G,) times."""
    width = len(layer.mean) // (2 * len(weights))
    roots = weights.sqrt().repeat_interleave(width).repeat(2)
    return replace(
        layer, price=(layer.price * roots).to(layer.price.dtype) * roots.to(layer.price.dtype)[:, None]
    )


class LayerMoments:
    """Gathers the sensitivity of one layer over parts of the text: all in float64, the price is kept in float32.

    The covariance is not: what hardly varies matters, and rounding would make it vary.
    """

    def __init__(self, elements: int):
        self.count = 0
        self.mean = torch.zeros(elements, dtype=torch.float64)
        self.covariance = torch.zeros(elements, elements, dtype=torch.float64)
        self.price = torch.zeros(elements, elements)
        self.rows, self.firsts = 0, torch.zeros(elements, dtype=torch.float64)
        self.sample = torch.zeros(0, elements)
        self.replaced_cost = torch.zeros((), dtype=torch.float64)

    @classmethod
    def of(cls, gathered: dict[str, Tensor]) -> LayerMoments:
        """The moments whose attributes are `gathered`, as tensors."""
        moments = cls(0)
        for name, value in gathered.items():
            setattr(moments, name, int(value) if name in ("count", "rows") else value)
        return moments

    def begin(self, firsts: Tensor) -> None:
        """Count the keys and values (rows, m) at the first position of rows."""
        self.rows += len(firsts)
        self.firsts += firsts.sum(0, dtype=torch.float64)

    def add(self, values: Tensor, gradients: Tensor) -> None:
        """Count keys and values (tokens, m), and the gradients at them (tokens, m)."""
        wanted = SAMPLE_TOKENS - len(self.sample)
        if wanted:
            self.sample = torch.cat((self.sample, values[:: -(-len(values) // wanted)].float()))
        values, priced = values.double(), _clipped(gradients.double())
        count = len(values)
        mean = values.mean(0)
        centred, moved = values - mean, mean - self.mean
        share = count / (self.count + count)
        self.covariance.lerp_(centred.mT @ centred / count, share)
        self.covariance.addr_(moved, moved, alpha=share * (1 - share))
        self.price.lerp_((priced.mT @ priced / count).float(), share)
        self.mean += share * moved
        self.count += count

    def sensitivity(self) -> LayerSensitivity:
        """What was gathered so far."""
        moments = self.mean, self.covariance, self.price, torch.tensor(self.count)
        return LayerSensitivity(*moments, self.firsts / max(1, self.rows), self.sample, self.replaced_cost)


def _clipped(gradients: Tensor) -> Tensor:
    sizes = gradients.square().sum(-1)
    shrunk = sizes.quantile(CLIPPED) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    return gradients * shrunk.clamp_max(1).sqrt().unsqueeze(-1)
