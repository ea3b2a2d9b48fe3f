"""Numbers of tokens as people write them: 200k, 20M, 1.5B."""

from __future__ import annotations

import math
import re

from mhconvert.errors import HealError

from ..validation.refusal import RefusedError

FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class UnwholeError(HealError, RefusedError):
    """A number that is no number of tokens."""


def token_count(value: int | str, name: str = "tokens") -> int:
    """20_000_000 from 20000000, "20M" or "20e6"; "200k", "1.5B". Raises HealError for what is no number of tokens."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmb]?)\s*", str(value).lower().replace("_", ""))
    if match is None:
        raise HealError(f"{name} '{value}' is not a number of tokens such as 200k or 20M")
    count = float(match[1]) * FACTORS[match[2]]
    if not math.isfinite(count) or count != int(count):
        raise UnwholeError(f"{name}={value} is not a whole number of tokens")
    return int(count)
