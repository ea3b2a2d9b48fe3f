"""Packed rows: every token once, in its place, and texts apart."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.heal.packed_rows import pack


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), max_size=20), length=st.integers(2, 16), rows=st.integers(1, 12))
def test_packing_keeps_every_token_in_its_place(sizes: list[int], length: int, rows: int) -> None:
    pieces, token = [], 0
    for size in sizes:
        pieces.append(list(range(token, token + size)))
        token += size
    found = pack(iter(pieces), length, rows)
    assert len(found) == min(rows, token // length)
    assert found.ids.flatten().tolist() == list(range(len(found) * length))
    begins = {piece[0] for piece in pieces}
    for ids, positions in zip(found.ids.tolist(), found.positions.tolist(), strict=True):
        expected = 0
        for place, (token, position) in enumerate(zip(ids, positions, strict=True)):
            expected = 0 if place == 0 or token in begins else expected + 1
            assert position == expected


def test_the_first_token_of_a_text_is_not_predicted_from_the_text_before_it() -> None:
    found = pack(iter([[5, 6, 7], [8, 9, 10]]), 6, 1)
    assert found.predicted().tolist() == [[True, True, False, True, True]]
