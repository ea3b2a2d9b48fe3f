"""Which component of which layer gets how many bits: reverse water-filling under one budget in bytes. Pure.

Source: Cover & Thomas, Elements of Information Theory, section 10.3.3 (parallel Gaussian sources); the distortions are
those of J. Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6 (1960), table I, and rows made as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhconvert.errors import BudgetError

from .latent_code import WIDTHS, row_bytes

# Mean squared error of the best scalar quantiser of 0, 1, … 8 bits for a normal variable of variance 1.
DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.0006424, 0.0001646, 0.00004152)
ANY = tuple(sorted(WIDTHS))
BISECTIONS = 60
# Of the largest divergence; what saves less is rounding, and would spoil the gain of a token.
LEAST_LEVEL = 1e-12


def least_bytes(layers: int, width: int = WIDTHS[-1]) -> int:
    """Bytes of the smallest code: one component of `width` bits a layer."""
    return most_bytes(layers, 1, width)


def most_bytes(layers: int, elements: int, width: int = WIDTHS[0]) -> int:
    """Bytes of the largest code: all elements of every layer in `width` bits."""
    return layers * row_bytes([elements * (width == each) for each in WIDTHS])


def allocate(
    spectra: Sequence[Tensor], budget: float, widths: Sequence[int] = ANY, tokens: Sequence[int] | None = None
) -> list[Tensor]:
    """Bits of every component, 0 or one of `widths`: as little divergence of the model as `budget` bytes allow.

    Every component's bits are where another bit would save less than the water level, which is one for the model. A
    layer has at least one component.

    Args:
        spectra: for each layer (n,), the divergence that leaving out each component adds, in nats per token.
        budget: bytes of the tokens' rows in all layers.
        widths: the bits that a component may have beside none.
        tokens: how many each layer holds; None: the budget is that of one token.
    Returns:
        For each layer (n,), int64.
    Raises:
        BudgetError: The budget is smaller than one component in each layer needs.
    """
    tokens = [1] * len(spectra) if tokens is None else tokens
    least = most_bytes(1, 1, min(widths)) * sum(tokens)
    if budget < least:
        raise BudgetError(
            f"a token's codes need at least {least} bytes in {len(spectra)} layers, and the budget gives {budget}"
        )
    highest = max(float(spectrum.max()) for spectrum in spectra)
    low, high = highest * LEAST_LEVEL / max(tokens), max(highest, 1e-30) * 2
    for _ in range(BISECTIONS):
        level = (low * high) ** 0.5
        bits = at_level(spectra, level, widths, tokens)
        used = sum(t * row_bytes(width_counts(b)) for t, b in zip(tokens, bits, strict=True))
        low, high = (low, level) if used <= budget else (level, high)
    return at_level(spectra, high, widths, tokens)


def width_counts(bits: Tensor) -> list[int]:
    """How many components have each of WIDTHS."""
    return [int((bits == width).sum()) for width in WIDTHS]


def expected_divergence(spectra: Sequence[Tensor], bits: Sequence[Tensor]) -> float:
    """Nats per token that coding adds, to second order and for normal components."""
    table = torch.tensor(DISTORTION, dtype=torch.float64)
    return sum(float((spectrum * table[b]).sum()) for spectrum, b in zip(spectra, bits, strict=True))


def at_level(
    spectra: Sequence[Tensor], level: float, widths: Sequence[int], tokens: Sequence[int]
) -> list[Tensor]:
    """Bits of every component at a price `level` of a bit of each token that a layer holds."""
    allowed = torch.tensor([0, *sorted(widths)])
    table = torch.tensor(DISTORTION, dtype=torch.float64)[allowed]
    bits = [
        allowed[(spectrum.unsqueeze(-1) * table + level * held * allowed).argmin(-1)]
        for spectrum, held in zip(spectra, tokens, strict=True)
    ]
    for spectrum, chosen in zip(spectra, bits, strict=True):
        if not chosen.any():
            chosen[spectrum.argmax()] = min(widths)
    return bits
