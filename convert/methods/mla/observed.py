"""What MLA conversions of a donor layer need of it: weights, second moments, and a basis of its rotary keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...attention.weights import LayerStatistics
from .assembly import NormedWeights
from .rotary_components import RotaryBasis


@dataclass(frozen=True)
class Observed:
    """What conversions of one donor layer read, the same for every budget; float64 on the CPU.

    Attributes:
        weights: the projections, as they are and scaled for the surgery.
        output_bias: (D,), of o_proj; zeros where it has none.
        statistics: second moments and phases on the calibration text.
        basis: principal components of the rotary keys.
    """

    weights: NormedWeights
    output_bias: Tensor
    statistics: LayerStatistics
    basis: RotaryBasis
