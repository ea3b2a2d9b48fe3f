"""Errors of counts: of a share, and whether changes go one way by chance."""

from __future__ import annotations

import math


def share_with_error(hits: int, number: int) -> tuple[float, float]:
    """(hits ÷ number, its standard error).

    Source:
        Agresti and Coull (1998), Approximate is better than "exact" for interval estimation of binomial proportions:
        two hits and two misses are added, so that 0 of n and n of n are not certain.
    """
    centre = (hits + 2) / (number + 4)
    return hits / number, math.sqrt(centre * (1 - centre) / (number + 4))


def at_least_by_chance(lost: int, changed: int) -> float:
    """The probability that of `changed` answers at least `lost` change to the worse where both ways are as likely.

    The exact sign test; McNemar's for pairs.
    """
    return sum(math.comb(changed, n) for n in range(lost, changed + 1)) / 2**changed
