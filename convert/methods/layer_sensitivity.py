"""What errors in one layer's keys and values cost the donor's predictions, as a survey measures it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerSensitivity:
    """Moments of one layer's keys (before RoPE) and values y [k; v], m = 2 G d elements, float64.

    Attributes:
        mean: (m,), E[y].
        moment: (m, m), E[y yᵀ].
        price: (m, m), E[g gᵀ], g = ∂ log p(token drawn from the model) / ∂y: the model's Fisher information, so that an
            error e of one token's y adds ½ eᵀ price e nats to the model's divergence, to second order.
    """

    mean: Tensor
    moment: Tensor
    price: Tensor
