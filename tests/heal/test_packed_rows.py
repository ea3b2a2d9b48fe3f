"""Packed rows: every token once, in its place, and texts apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.convert.methods.swa.method import SWA
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.heal.packed_rows import pack, reads_rows_whole
from mhconvert.heal.student import states
from tests.convert.conversions import assembled, converted_layers, donor_model, relative, token_ids
from tests.convert.methods.hybrid_mla.hybrids import hybrid


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


def test_a_text_alone_in_its_rows_is_followed_by_what_nothing_predicts() -> None:
    found = pack(iter([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]), 4, 9, alone=True)
    assert found.ids.tolist() == [[5, 6, 7, 7], [8, 9, 10, 11], [12, 13, 14, 14], [15, 15, 15, 15]]
    assert found.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert found.predicted().sum(1).tolist() == [2, 3, 2, 0]


@pytest.mark.parametrize("of", ["first", "hybrid"])
def test_a_document_is_read_as_it_is_alone(of: str) -> None:
    """By a model that keeps first tokens or states, which the second text of a packed row would share."""
    if of == "first":
        donor = donor_model(layers=2, hidden=32)
        method = SWA(donor.config, SWASettings(window=4, context=24, sinks="first", full_layers=[]), "quick")
        model = assembled(donor, method, converted_layers(donor, method, token_ids(1, 24)))
    else:
        model = hybrid("mamba2", [1])[1]
    assert reads_rows_whole(model.config)
    assert not reads_rows_whole(donor_model(layers=2, hidden=32).config)
    texts = token_ids(2, 12).tolist()
    expected = [model.get_decoder()(torch.tensor([text])).last_hidden_state[0] for text in texts]

    def worst(alone: bool) -> float:
        rows = pack(iter(texts), 24, 2 if alone else 1, alone)
        found = states(model, rows)[-1].reshape(-1, 32)
        parts = (found[begin : begin + 12] for begin in (0, 24 if alone else 12))
        return max(relative(part, other) for part, other in zip(parts, expected, strict=True))

    with torch.no_grad():
        assert worst(alone=True) < 1e-5
        assert worst(alone=False) > 1e-3
