"""A conversion on a device beside the CPU: no operation mixes the two, and float64 stays on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mhconvert
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.recipe import Recipe
from tests.donors import make_donor
from tests.stand_in_device import NAME, StandInDevice

METHODS: list[tuple[str, Any, int]] = [  # method, settings, steps of the fit
    ("mla", MLASettings(kv_budget=0.25), 0),
    ("mla", MLASettings(kv_budget=0.5, kv_bits="16"), 2),
    ("dha", DHASettings(kv_budget=0.5), 2),
    ("moh", MoHSettings(active=0.75), 2),
]


@pytest.mark.parametrize(("method", "settings", "steps"), METHODS)
def test_a_conversion_on_a_device_is_the_one_on_the_cpu(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: Any,
    steps: int,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # 32-bit products on both
    asked = {"model": str(make_donor(tmp_path / "donor")), "method": method, "settings": settings}
    asked |= {"fit_steps": steps}
    expected = mhconvert.convert(recipe(tmp_path / "cpu", **asked))
    with StandInDevice() as device:
        report = mhconvert.convert(recipe(tmp_path / "device", device=NAME, **asked))
    assert device.operations > 1000
    # Sums in another order round otherwise, and a survey then gives a bit to another component.
    assert report["kl"] == pytest.approx(expected["kl"], rel=0.1)
