"""How many steps the fits take."""

from __future__ import annotations

import dataclasses

import pytest

from mhconvert.convert.layer_pass.layer_steps import FIT_STEPS, layer_fit_steps
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.registry import build_method
from mhconvert.convert.recipe.recipe import Recipe
from tests.donors import make_config


@pytest.mark.parametrize(("length", "part"), [(512, 1), (1024, 1), (4096, 4), (8192, 8)])
def test_a_fit_reads_as_many_tokens_whatever_the_length_of_a_row(length: int, part: int) -> None:
    recipe = Recipe("x", "swa")
    method = build_method("swa", make_config(), recipe.settings, recipe.effort)
    assert layer_fit_steps(recipe, method, length) == FIT_STEPS["default"] // part
    assert layer_fit_steps(Recipe("x", "swa", fit_steps=7), method, length) == 7


@pytest.mark.parametrize(("method", "steps"), [("mla", 120), ("dha", 150), ("moh", 180), ("swa", 180)])
def test_fits_that_need_fewer_steps_take_fewer(method: str, steps: int) -> None:
    settings = MLASettings(kv_bits="16") if method == "mla" else None
    recipe = Recipe("x", method, settings)
    built = build_method(method, make_config(), recipe.settings, recipe.effort)
    assert layer_fit_steps(recipe, built, 512) == steps
    assert layer_fit_steps(dataclasses.replace(recipe, effort="quick"), built, 512) == 0
    assert layer_fit_steps(dataclasses.replace(recipe, effort="high"), built, 512) == FIT_STEPS["high"]
