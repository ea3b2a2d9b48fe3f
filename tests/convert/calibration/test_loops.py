"""Loops in lists of tokens that are written by hand."""

from __future__ import annotations

import pytest

from mhconvert.convert.calibration.loops import longest_loop


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([], 0),
        ([5, 5], 0),
        ([5, 5, 5], 3),
        ([1, 2, 3, 4, 5, 6], 0),
        ([9, 1, 2, 1, 2, 1, 2, 1, 8], 7),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0),
        ([0, 0, 0, 1, 2, 3, 1, 2, 3, 1, 2, 3], 9),
    ],
    ids=["nothing", "twice", "thrice", "none", "two, and a half more", "only twice", "the longer of two"],
)
def test_longest_loop(tokens: list[int], length: int) -> None:
    assert longest_loop(tokens) == length
