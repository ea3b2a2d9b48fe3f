"""Measuring and generating on a device beside the CPU: no operation mixes the two, and the results are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhconvert import api
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.eval.settings import EvalSettings
from tests.donors import TEXT, make_checkpoint, make_donor
from tests.stand_in_device import NAME, StandInDevice

METHODS: dict[str, tuple[str, Any]] = {
    "coded mla": ("mla", MLASettings(kv_budget=0.25)),
    "16-bit mla": ("mla", MLASettings(kv_budget=0.5, kv_bits="16")),
    "dha": ("dha", DHASettings(kv_budget=0.5)),
    "moh": ("moh", MoHSettings(active=0.75)),
    "hydra": ("hydra", HydraSettings()),
}
PROMPT = "The river ran slowly"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 2, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=METHODS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each method, its donor beside it."""
    return make_checkpoint(tmp_path_factory.mktemp("converted") / "ckpt", *METHODS[request.param])


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("plain") / "donor")


def generated(checkpoint: Path, device: str, **options: Any) -> dict[str, Any]:
    """Without the seconds, which differ."""
    return api.generate(str(checkpoint), PROMPT, max_new_tokens=12, device=device, **options) | {"seconds": 0}


def test_text_is_generated_with_a_cache(checkpoint: Path) -> None:
    expected = generated(checkpoint, "cpu")
    with StandInDevice() as device:
        assert generated(checkpoint, NAME) == expected
    assert device.operations > 500


def test_text_is_generated_with_a_cache_of_codes(donor: Path) -> None:
    expected = generated(donor, "cpu", kv_cache_dtype="int4")
    with StandInDevice():
        assert generated(donor, NAME, kv_cache_dtype="int4") == expected


def test_tasks_are_scored(donor: Path) -> None:
    settings = EvalSettings(suite="quick", limit=2)
    expected = api.evaluate(str(donor), settings, against=str(donor), device="cpu", fresh=True)
    with StandInDevice() as device:
        found = api.evaluate(str(donor), settings, against=str(donor), device=NAME, fresh=True)
    assert device.operations > 100
    assert found["tasks"] == expected["tasks"]


def test_a_number_in_a_text_is_found_as_often(donor: Path) -> None:
    settings = EvalSettings(retrieval=True)
    expected = api.evaluate(str(donor), settings, against=str(donor), device="cpu", fresh=True)
    with StandInDevice() as device:
        found = api.evaluate(str(donor), settings, against=str(donor), device=NAME, fresh=True)
    assert device.operations > 100
    for mine, theirs in zip(*(result["retrieval"]["models"] for result in (found, expected)), strict=True):
        assert mine["recalled"] == theirs["recalled"]
        assert mine["nll"] == [pytest.approx(row, rel=1e-4) for row in theirs["nll"]]


def test_a_text_is_measured(checkpoint: Path, text: Path) -> None:
    settings = EvalSettings(text=(str(text),), sequences=2, sequence_length=32)
    expected = api.evaluate(str(checkpoint), settings, device="cpu", fresh=True)
    with StandInDevice() as device:
        found = api.evaluate(str(checkpoint), settings, device=NAME, fresh=True)
    assert device.operations > 500
    for mine, theirs in zip(found["texts"][0]["models"], expected["texts"][0]["models"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert found["cache"] == expected["cache"]
