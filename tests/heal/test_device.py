"""Healing on a device beside the CPU: no operation mixes the two, float64 stays on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mhconvert import api
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.heal import schedule
from mhconvert.heal.metrics import read
from tests.donors import TEXT, make_checkpoint
from tests.stand_in_device import DEVICE, StandInDevice

ROWS = {"sequence_length": 32, "batch_tokens": 64, "micro_batch": 1, "held_out": 1, "lr": 1e-3}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {  # method, its settings, those of healing
    "coded mla": ("mla", MLASettings(kv_budget=0.25), {"train": "attention"}),
    "coded mla, lora": ("mla", MLASettings(kv_budget=0.25), {"train": "lora", "layer_tokens": 64}),
    "16-bit mla, all": ("mla", None, {"train": "all", "loss": {"kl": 1.0, "ce": 0.1, "hidden": 0.1}}),
    "dha": ("dha", DHASettings(kv_budget=0.5), {"train": "attention", "layer_tokens": 64}),
    "dha, fused": ("dha", DHASettings(kv_budget=0.5, fusion="trained"), {"fusion": 2}),
    "moh": ("moh", MoHSettings(active=0.75), {"router": "trained", "loss": {"kl": 1.0, "balance": 0.01}}),
    "hydra": ("hydra", HydraSettings(), {"train": "hydra", "loss": {"ce": 1.0}}),
}


class OnStandIn(Accelerator):
    """An accelerator of one process whose device is the stand-in."""

    device = property(lambda _: DEVICE)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_healing_on_a_device_is_that_on_the_cpu(
    case: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran in this process before
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # the device has no bfloat16 products either
    method, settings, healed = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "ckpt", method, settings)
    asked = HealSettings(tokens=128, data={str(text): 1.0}, device="cpu", **ROWS, **healed)
    expected = api.heal(str(checkpoint), asked, output=str(tmp_path / "cpu"), verify=False)
    monkeypatch.setattr(schedule, "Accelerator", OnStandIn)
    with StandInDevice() as device:
        report = api.heal(str(checkpoint), asked, output=str(tmp_path / "device"), verify=False)
    assert device.operations > 500
    found, wanted = (
        [entry for entry in read(tmp_path / name / "metrics.jsonl") if "loss" in entry]
        for name in ("device", "cpu")
    )
    for name in ("loss", "gradient_norm"):
        assert found[0][name] == pytest.approx(wanted[0][name], rel=1e-3, abs=1e-5)
    assert report["before"]["kl"] == pytest.approx(expected["before"]["kl"], rel=1e-3, abs=1e-6)
    assert report["kl"] == pytest.approx(expected["kl"], rel=0.02, abs=1e-6)
    assert report["perplexity"]["converted"] == pytest.approx(expected["perplexity"]["converted"], rel=0.02)
