"""A tiny donor, a text, and recipes that convert the one with the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.mla.settings import MLASettings
from mhconvert.convert.recipe import Calibration, Recipe
from tests.donors import make_donor

LAYERS = 5


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("pipeline") / "tiny", layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(300))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, **changes: Any) -> Recipe:
        settings = {
            "settings": MLASettings(kv_budget=0.5),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 3,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(str(donor), "mla", output=str(output), **(settings | changes))

    return build
