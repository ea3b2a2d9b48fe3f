"""The transform of a layer's coder: keys before RoPE and values, decorrelated in the metric of what errors cost. Pure.

Shapes: y [k; v] of all KV heads of a layer, m = 2 G d elements; n components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ...attention.linalg import roots
from ..layer_sensitivity import LayerSensitivity, weighted

RIDGE = 0.1  # of the mean price of keys or values, added to every one: prices are estimated from few tokens
TINY = 1e-20
RANGE_TOLERANCE = 1e-12  # of the largest eigenvalue; smaller ones are rounding


@dataclass(frozen=True)
class CodeBasis:
    """A layer's transform, float64, its components ordered by `divergence`, the largest first.

    Attributes:
        mean: (m,).
        down: (m, m), z = down @ (y − mean), of variance 1.
        up: (m, m), y − mean = up @ z.
        divergence: (m,), nats per token that leaving out a component adds.
        first, sample: y at the first position of a row, and of some tokens, as in `LayerSensitivity`.
    """

    mean: Tensor
    down: Tensor
    up: Tensor
    divergence: Tensor
    first: Tensor
    sample: Tensor


def code_basis(layer: LayerSensitivity) -> CodeBasis:
    """The Karhunen-Loève transform of y in the metric of the price.

    A component's error then costs its variance, whatever the others' are, which is what makes bits divide by
    water-filling. Source: transform coding, V. K. Goyal, IEEE Signal Processing Magazine 18(5), 2001.
    """
    root, inverse = roots(_ridged(layer.price.double()))
    values, vectors = torch.linalg.eigh(root @ layer.covariance.double() @ root)
    values = shrunk_spectrum(values, int(layer.tokens) - 1)
    values, vectors = values.flip(0).clamp_min(TINY), vectors.flip(1)
    scale = values.sqrt()
    down, up = (vectors / scale).mT @ root, inverse @ vectors * scale
    return CodeBasis(layer.mean.double(), down, up, values / 2, layer.first, layer.sample)


class LayerBases(Sequence[CodeBasis]):
    """The transform of each layer, made when it is asked for: those of all layers together are as large as a model."""

    def __init__(self, layers: Sequence[LayerSensitivity], weights: Sequence[Tensor | None] = ()):
        """weights: per layer, how often errors of each KV head count, (G,); None or left out: once."""
        self._layers, self._weights = layers, weights or [None] * len(layers)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> CodeBasis: ...

    @overload
    def __getitem__(self, index: slice) -> LayerBases: ...

    def __getitem__(self, index: int | slice) -> CodeBasis | LayerBases:
        if isinstance(index, slice):
            return LayerBases(self._layers[index], self._weights[index])
        layer, weights = self._layers[index], self._weights[index]
        return code_basis(layer if weights is None else weighted(layer, weights))


def shrunk_spectrum(values: Tensor, samples: int) -> Tensor:
    """What the eigenvectors of a sample's covariance have as variances in other samples, from its eigenvalues.

    Of few samples the small eigenvalues are far too small: their components would get no bits, and vary in other text.
    Eigenvalues that are zero whatever the text stay zero; there are some where m is above the hidden size.

    Args:
        values: (m,), ascending, float64.
        samples: degrees of freedom, one less than the tokens.

    Source:
        O. Ledoit & M. Wolf, Quadratic shrinkage for large covariance matrices, Bernoulli 28 (2022), its quadratic-
        inverse shrinkage.
    """
    varying = int((values > values[-1] * RANGE_TOLERANCE).sum())
    spectrum = values[-varying:] if varying < min(samples, len(values)) else values
    number, ratio = min(len(spectrum), samples), len(spectrum) / max(samples, 1)
    if number < 2 or values[-1] <= 0:
        return values
    width = min(ratio**2, ratio**-2) ** 0.35 / len(spectrum) ** 0.35
    inverse = 1 / spectrum[-number:].clamp_min(spectrum[-1] * RANGE_TOLERANCE)
    apart = inverse - inverse.unsqueeze(1)
    weight = inverse / (apart**2 + (width * inverse) ** 2) / number
    shifted, spread = (weight * apart).sum(1), (weight * width * inverse).sum(1)
    energy = inverse * (shifted**2 + spread**2)
    if ratio <= 1:
        found = 1 / (
            (1 - ratio) ** 2 * inverse + 2 * ratio * (1 - ratio) * inverse * shifted + ratio**2 * energy
        )
    else:
        unseen = spectrum.new_full((len(spectrum) - number,), 1 / ((ratio - 1) * float(inverse.mean())))
        found = torch.cat((unseen, 1 / energy))
    found = (found * (spectrum.sum() / found.sum())).sort().values
    return torch.cat((values.new_zeros(len(values) - len(found)), found))


def _ridged(price: Tensor) -> Tensor:
    """`price` and a share of the mean price of keys, or of values: directions that few tokens priced are not free."""
    half = len(price) // 2
    means = price.diagonal().view(2, half).mean(1, keepdim=True).expand(2, half).flatten()
    return price + torch.diag(RIDGE * means.clamp_min(TINY))
