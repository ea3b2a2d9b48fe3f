"""Levels of a scalar quantiser from samples. Source: S. P. Lloyd, Least squares quantization in PCM, 1982, method I."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .latent_code import LEVELS, WIDTHS, level_offset

ROUNDS = 30
SPREAD = (
    3.0**0.5
)  # the density of many levels is best as that of a normal variable of three times the variance
MOST_SAMPLES = 1 << 17  # of a width: 512 for each of its levels at least
ENOUGH_SAMPLES = 16  # for each level; a width with fewer keeps the normal levels


@cache
def normal_levels(width: int) -> Tensor:
    """(2^width,), close to the best levels for a normal variable of variance 1, float64.

    Source: P. F. Panter & W. Dite, Proc. IRE 39 (1951): the best density is the cube root of the variable's.
    """
    places = (torch.arange(2**width, dtype=torch.float64) + 0.5) / 2**width
    levels = SPREAD * torch.special.ndtri(places)
    return fitted_levels(
        torch.special.ndtri((torch.arange(1 << 14, dtype=torch.float64) + 0.5) / (1 << 14)), levels
    )


def fitted_levels(samples: Tensor, levels: Tensor) -> Tensor:
    """`levels` moved to where the squared error of `samples` is least, starting from where they are.

    A level that no sample is nearest to stays where it is.
    """
    ordered = samples.sort().values
    sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    for _ in range(ROUNDS):
        bounds = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        bounds = torch.cat((bounds.new_zeros(1), bounds, bounds.new_full((1,), len(ordered))))
        count, total = bounds.diff(), sums[bounds[1:]] - sums[bounds[:-1]]
        levels = torch.where(count > 0, total / count.clamp_min(1), levels)
    return levels


def layer_levels(components: Tensor, ranges: list[tuple[int, int, int]]) -> Tensor:
    """(LEVELS,), the levels of every width for one layer, float64.

    Args:
        components: (tokens, n), divided by each token's gain.
        ranges: (width, start, stop) of the components that have each width.
    """
    levels = torch.empty(LEVELS, dtype=torch.float64)
    samples = {width: _few(components[:, start:stop]).flatten().double() for width, start, stop in ranges}
    for width in WIDTHS:
        begin = level_offset(width)
        made = normal_levels(width)
        if width in samples and len(samples[width]) >= ENOUGH_SAMPLES * 2**width:
            made = fitted_levels(samples[width], made)
        levels[begin : begin + 2**width] = made
    return levels


def _few(components: Tensor) -> Tensor:
    """Some of the tokens of (tokens, n), so that there are no more than MOST_SAMPLES elements or a token's."""
    return components[:: -(-components.numel() // MOST_SAMPLES) or 1]
