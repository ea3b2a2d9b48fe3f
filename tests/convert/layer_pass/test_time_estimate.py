"""The time that a dry run expects: of the products of each stage at given rates, and at those of this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mhconvert.convert import pipeline
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass import time_estimate
from mhconvert.convert.layer_pass.time_estimate import Rates, expected_seconds, probe
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.registry import build_method
from mhconvert.convert.recipe.calibration_settings import Calibration
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe

Build = Callable[..., Recipe]
SLOW = Rates(single=1e6, half=1e6, double=1e6, read=1e6)
CODED = MLASettings(kv_bits="auto", kv_budget=0.25)


def expected(recipe: Recipe, rates: Rates = SLOW, **changes: Any) -> dict[str, float]:
    recipe = dataclasses.replace(recipe, **changes)
    donor = open_donor(recipe.model)
    method = build_method(recipe.method, donor.config, recipe.settings, recipe.effort)
    return expected_seconds(recipe, donor, method, torch.device("cpu"), rates)


def test_what_makes_a_stage_longer(recipe: Build, tmp_path: Path) -> None:
    asked = recipe(tmp_path / "out", verify=True)
    plain, coded = expected(asked), expected(asked, settings=CODED)
    assert plain["calibrate"] == 0
    twice = dataclasses.replace(asked.calibration, tokens=2048)
    assert expected(asked, settings=CODED, calibration=twice)["survey"] == pytest.approx(2 * coded["survey"])
    more = expected(asked, fit_steps=6)["layers"] - expected(asked, fit_steps=0)["layers"]
    assert more == pytest.approx(2 * (plain["layers"] - expected(asked, fit_steps=0)["layers"]))
    assert expected(asked, effort="quick")["survey"] == 0
    assert expected(asked, verify=False)["verify"] == 0


def test_sampled_text_takes_its_steps(recipe: Build, tmp_path: Path) -> None:
    """Whatever the products take: each step reads the weights once, and twice as many rows take as many steps."""
    fast = Rates(single=1e30, half=1e30, double=1e30, read=1e6)
    asked = recipe(tmp_path / "out")
    seconds = [
        expected(asked, fast, calibration=Calibration(tokens=tokens, sequence_length=64))["calibrate"]
        for tokens in (1024, 2048)
    ]
    parameters = sum(p.numel() for p in open_donor(asked.model).skeleton().parameters())
    assert seconds[0] == seconds[1] == pytest.approx(64 * 4 * parameters / 1e6, rel=0.01)


def test_a_faster_machine_takes_less(recipe: Build, tmp_path: Path) -> None:
    asked = recipe(tmp_path / "out")
    fast = Rates(*(10 * rate for rate in dataclasses.astuple(SLOW)))
    slow_stages, fast_stages = expected(asked), expected(asked, fast)
    assert slow_stages["layers"] == pytest.approx(10 * fast_stages["layers"])


def test_the_probe_takes_half_a_second_and_measures_products() -> None:
    rates = probe(torch.device("cpu"))
    assert 1e8 < rates.double < rates.single < 1e14
    assert 1e8 < rates.read < 1e13
    assert 4 * time_estimate.PROBE_SECONDS < 0.6


def test_a_dry_run_has_the_stages_of_the_report(recipe: Build, tmp_path: Path) -> None:
    plan = pipeline.plan(recipe(tmp_path / "out", verify=True))
    assert set(plan["expected_seconds"]) == {"donor", "calibrate", "survey", "layers", "verify"}
    assert all(0 <= seconds < 600 for seconds in plan["expected_seconds"].values())


def test_no_time_is_said_of_what_is_not_counted(recipe: Build, tmp_path: Path) -> None:
    asked = recipe(tmp_path / "out")
    searched = dataclasses.replace(asked, settings=MLASettings(kv_bits="auto"), tolerance="kl=0.05")
    healed = dataclasses.replace(asked, heal=HealSettings(tokens=100_000))
    assert all("expected_seconds" not in pipeline.plan(each) for each in (searched, healed))
