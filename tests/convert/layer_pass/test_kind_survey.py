"""What a surveyed plan says of each layer as windowed and as linear, whichever of the methods it is a plan of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass.context import ConversionContext
from mhconvert.convert.layer_pass.kind_survey import surveyed_plan
from mhconvert.convert.methods.registry import build_method, settings_class
from mhconvert.convert.methods.swa.modeling_swa import in_window
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.layer_fit import fit
from mhconvert.progress import ignore
from tests.donors import make_donor

LAYERS, WINDOW, CONTEXT, LENGTH = 3, 16, 128, 128
STRENGTH = (0.3, 0.06, 0.15)  # of each layer's attention: changes are small, and unlike each other


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_donor(tmp_path_factory.mktemp("kinds") / "tiny", layers=LAYERS, std=0.2)
    weights = load_file(folder / "model.safetensors")
    for layer, strength in enumerate(STRENGTH):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= strength
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(method: str, length: int = LENGTH, **settings: Any) -> Recipe:
        return Recipe(
            str(donor),
            method,
            settings=settings_class(method)(**({"kv_budget": 0.6, "context": CONTEXT} | settings)),
            calibration=Calibration((str(text),), tokens=2048, sequence_length=length, held_out=2),
            output=f"nowhere-{method}",
            device="cpu",
        )

    return build


def surveyed(recipe: Recipe) -> dict[str, Any]:
    """The plan that `--dry-run --survey` prints, without the time that a conversion would take."""
    donor, device = open_donor(recipe.model), torch.device("cpu")
    rows = calibration_rows.draw(recipe, donor, device, ignore)
    inputs = recipe, donor, device, torch.float32, rows
    method = build_method(recipe.method, donor.config, recipe.settings, recipe.effort)
    return surveyed_plan(ConversionContext(*inputs, fit, Fidelity, ignore), method)


def costs(plan: dict[str, Any], kind: str) -> list[float]:
    return [layer["costs"][kind] for layer in plan["layers"]]


def test_every_layer_has_the_price_of_every_kind(donor: Path, recipe: Callable[..., Recipe]) -> None:
    """The price of a window is near the KL of the donor with that one layer windowed, computed here on whole models."""
    asked = recipe("swa", window=WINDOW, sinks="first")
    windows, hybrid = (
        surveyed(asked),
        surveyed(recipe("hybrid")),
    )  # whose default is an eighth of the context: as wide
    assert costs(hybrid, "windowed") == pytest.approx(costs(windows, "windowed"), rel=1e-5)
    assert costs(windows, "linear") == costs(hybrid, "linear")
    assert windows["priced"] == {
        "windowed": {"method": "swa", "window": WINDOW, "sinks": "first"},
        "linear": {"method": "hybrid", "mixer": "mamba2"},
    }
    assert hybrid["priced"]["windowed"] == {"method": "mla+swa", "window": WINDOW, "sinks": "first"}
    opened = open_donor(str(donor))
    model = opened.model(torch.device("cpu"), torch.float32)
    rows = calibration_rows.draw(asked, opened, torch.device("cpu"), ignore).fit
    ids = rows[-calibration_rows.judging_rows(LENGTH, len(rows)) :]
    exact = []
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        for layer in model.model.layers:
            whole = layer.self_attn
            layer.self_attn = in_window(copy.deepcopy(whole), WINDOW)
            found = model(ids).logits.log_softmax(-1)
            layer.self_attn = whole
            exact.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    ratios = [priced / kl for priced, kl in zip(costs(windows, "windowed"), exact, strict=True)]
    assert max(exact) > 20 * min(exact)
    assert all(0.6 < ratio < 1.6 for ratio in ratios)
    kept = {layer["index"] for layer in windows["layers"] if layer["kind"] == "full"}
    assert kept == set(sorted(range(LAYERS), key=lambda i: -exact[i])[: len(kept)])
    assert 0 < len(kept) < LAYERS


def test_a_kind_that_the_text_or_the_donor_does_not_show_has_a_reason(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    short = surveyed(recipe("hybrid", length=16))
    assert short["priced"]["windowed"]["reason"].startswith(
        "rows of 16 tokens show nothing of a window of 16;"
    )
    assert all(set(layer["costs"]) <= {"linear", "codes"} for layer in short["layers"])
    named = surveyed(recipe("mla+swa", full_layers=[0]))
    assert named["priced"]["windowed"] == {
        "reason": "the plan, or the list of layers, says which ones they are"
    }
    own = make_donor(tmp_path / "own", layers=4, family="gemma2", sliding_window=17)
    asked = dataclasses.replace(recipe("swa", kv_budget=0.8, window=17), model=str(own))
    plan = surveyed(asked)
    assert "has a window of 17" in plan["priced"]["linear"]["reason"]
    shares = [(layer["kind"], layer["kv_share"], "costs" in layer) for layer in plan["layers"]]
    assert shares.count(("windowed", 1.0, False)) == 2  # the donor's own
