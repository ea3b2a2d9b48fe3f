"""What calibration settings mean for a donor of a given context length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

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
