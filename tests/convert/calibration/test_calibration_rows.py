"""What calibration settings mean for a donor of a given context length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import CalibrationError


@pytest.mark.parametrize(
    ("chosen", "limit", "length"), [(None, 2048, 512), (None, 64, 64), (None, None, 512), (8, 64, 8)]
)
def test_the_length_of_a_row(chosen: int | None, limit: int | None, length: int) -> None:
    recipe = Recipe("x", "mla", calibration=Calibration(sequence_length=chosen))
    assert calibration_rows.row_length(recipe, SimpleNamespace(max_position_embeddings=limit)) == length


@pytest.mark.parametrize(
    ("calibration", "limit", "message"),
    [
        (Calibration(sequence_length=65), 64, "sequence_length=65 is more than the donor reads; choose"),
        (Calibration(), 4, "the donor reads 4 tokens, too few for a row; it takes 8"),
        (Calibration(tokens=63), 64, "63 calibration tokens do not fill one row of 64"),
    ],
)
def test_what_a_donor_cannot_read(calibration: Calibration, limit: int, message: str) -> None:
    config = SimpleNamespace(max_position_embeddings=limit)
    with pytest.raises(CalibrationError, match=message):
        calibration_rows.check(Recipe("x", "mla", calibration=calibration), config)


@pytest.mark.parametrize(
    ("sources", "sampled"), [(("self",), 42), (("a", "self", "b"), 14), (("a", "b"), 0), (("self", "a"), 21)]
)
def test_sampled_text_beside_files_is_as_many_rows_as_of_one_source(
    sources: tuple[str, ...], sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(read: tuple[str, ...], _: object, rows: int, length: int, __: int) -> tuple[Tensor, list[str]]:
        assert "self" not in read
        return torch.zeros(rows, length, dtype=torch.long), [read[row % len(read)] for row in range(rows)]

    def sample(_: object, __: object, rows: int, length: int, *___: object) -> Tensor:
        return torch.ones(rows, length, dtype=torch.long)

    monkeypatch.setattr(calibration_rows, "text_rows", text)
    monkeypatch.setattr(calibration_rows, "sampled_rows", sample)
    donor: Any = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=64, vocab_size=2),
        tokenizer=lambda: None,
        model=lambda *_: None,
        dtype=torch.float32,
    )
    calibration = Calibration(sources, tokens=640, sequence_length=16, held_out=2)
    recipe = Recipe("x", "mla", calibration=calibration)
    rows = calibration_rows.draw(recipe, donor, torch.device("cpu"), lambda _: None)
    assert (len(rows.fit), len(rows.held_out)) == (40, 2)
    assert len(set(rows.sources)) == min(len(sources), 2)
    assert [source == "self" for source in rows.sources] == rows.held_out.bool().all(1).tolist()
    kinds = torch.cat((rows.fit, rows.held_out)).float().mean(1)
    assert int(kinds.sum()) == sampled
    assert len(kinds[:20].unique()) == len(kinds.unique())  # in no order


@pytest.mark.parametrize(
    ("names", "count", "taken"),
    [
        ("aaaaaa", 2, [4, 5]),
        ("abababab", 4, [4, 5, 6, 7]),
        ("aaaaaab", 3, [3, 4, 5]),  # the only row of b is calibrated on
        ("aaaabb", 3, [2, 3, 5]),
        ("abcd", 2, [0, 1]),
    ],
)
def test_held_out_rows_are_spread_over_sources(names: str, count: int, taken: list[int]) -> None:
    assert calibration_rows._spread(names, count) == taken
