"""Loops in a text that a model wrote: tokens that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 64  # tokens that a loop repeats at most
REPEATS = 3  # from which on a repetition is a loop
LOOP_SHARE, LOOP_TOKENS = 0.5, 16  # a text loops whose loop is this part of it, and this long


def loops(tokens: Sequence[int]) -> bool:
    """Whether a loop is half of the text or more."""
    return longest_loop(tokens) >= max(LOOP_TOKENS, LOOP_SHARE * len(tokens))


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that repeats one to LONGEST_PERIOD tokens REPEATS times or more; 0 without one."""
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        equal = 0
        for at in range(period, len(tokens)):
            equal = equal + 1 if tokens[at] == tokens[at - period] else 0
            if equal >= (REPEATS - 1) * period:
                longest = max(longest, equal + period)
    return longest
