"""What an MLA conversion reads of a donor layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...attention.weights import LayerStatistics
from .assembly import NormedWeights
from .surgery import RotaryBasis


@dataclass(frozen=True)
class Observed:
    """All of a donor layer that its conversions read, whatever their budgets; float64 on the CPU."""

    weights: NormedWeights
    output_bias: Tensor
    statistics: LayerStatistics
    basis: RotaryBasis
