"""Numerical trouble is carried through exactly, or named with its layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.convert.storage.dtype_cast import cast
from mhconvert.errors import CheckpointError
from tests.convert.methods.mla.test_families_exact import VARIANTS
from tests.donors import make_donor

EXACT = 1e-8  # of a squared error: float32
LAYER = "model.layers.1.self_attn."


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A tiny donor with some of its weights changed."""
    make_donor(folder, kv_heads=2, **config)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe_for(donor: Path, text: Path, **changes: Any) -> Recipe:
    calibration = Calibration((str(text),), tokens=512, sequence_length=64, held_out=2)
    settings = {
        "settings": MLASettings(kv_budget=0.5, kv_bits="16"),
        "calibration": calibration,
        "fit_steps": 0,
    }
    plain = {"verify": False, "device": "cpu", "output": str(donor.parent / "out")}
    return Recipe(str(donor), "mla", **(settings | plain | changes))


def zero(*projections: str, heads: slice) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for projection in projections:
            weights[f"{LAYER}{projection}.weight"].unflatten(0, (-1, 16))[heads] = 0

    return change


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize(("family", "heads"), [("llama", 1), ("llama", None), ("qwen3", None)])
def test_zero_heads(projection: str, family: str, heads: int | None, tmp_path: Path, text: Path) -> None:
    donor = changed(tmp_path / "donor", zero(projection, heads=slice(0, heads)), family=family)
    whole = MLASettings(kv_lora_rank=32, qk_rope_head_dim=32)
    report = mhconvert.convert(recipe_for(donor, text, settings=whole))
    assert all(layer["relative_error"] < EXACT for layer in report["layers"])
    report = mhconvert.convert(recipe_for(donor, text), force=True)
    assert all(0 <= layer["relative_error"] < 1 for layer in report["layers"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_fewer_tokens_than_the_hidden_size(family: str, tmp_path: Path, text: Path) -> None:
    """24 tokens span 24 of 64 directions; full rank is exact in all of them all the same."""
    donor = make_donor(tmp_path / "donor", family=family, kv_heads=2, **VARIANTS[family] | {"head_dim": 16})
    few = Calibration((str(text),), tokens=24, sequence_length=24, held_out=2)
    whole = MLASettings(kv_lora_rank=32, qk_rope_head_dim=32)
    report = mhconvert.convert(recipe_for(donor, text, calibration=few, settings=whole))
    assert all(layer["relative_error"] < EXACT for layer in report["layers"])
    report = mhconvert.convert(recipe_for(donor, text, calibration=few), force=True)
    assert all(layer["relative_error"] < 5 for layer in report["layers"])  # poor, and a number


@pytest.mark.parametrize(("family", "seed"), [("qwen3", 0), ("llama", 0), ("llama", 1)])
def test_many_tokens_of_few_kinds(family: str, seed: int, tmp_path: Path, text: Path) -> None:
    """1024 tokens, some 40 of them different: in layer 0 most directions are never seen, and must not be amplified."""
    options = VARIANTS.get(family, {}) | {"head_dim": 32}
    donor = make_donor(tmp_path / "donor", family=family, kv_heads=2, layers=2, seed=seed, **options)
    many = Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2)
    report = mhconvert.convert(recipe_for(donor, text, calibration=many, effort="quick"))
    assert report["layers"][0]["relative_error"] < 0.01


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"tensor layer 1: mlp\.up_proj\.weight reaches 1e\+05"),
        (f"{LAYER}o_proj.weight", r"tensor layer 1: self_attn\.o_proj\.weight reaches 1e\+05"),
        ("model.norm.weight", r"tensor model\.norm\.weight reaches 1e\+05"),
    ],
)
def test_weights_that_float16_cannot_hold(name: str, words: str, tmp_path: Path, text: Path) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[0] = 1e5

    donor = changed(tmp_path / "donor", enlarge)
    with pytest.raises(CheckpointError, match=words + ".* float16 ends at 6.55e.04.*--dtype bfloat16"):
        mhconvert.convert(recipe_for(donor, text, dtype="float16"))
    assert mhconvert.convert(recipe_for(donor, text, dtype="bfloat16"), resume=False, force=True)["layers"]


def test_hidden_states_that_leave_float32_are_named_with_their_layer(tmp_path: Path, text: Path) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"] *= 1e30
        weights["model.layers.0.mlp.down_proj.weight"] *= 1e30

    donor = changed(tmp_path / "donor", enlarge)
    with pytest.raises(CheckpointError, match="layer 1: the donor's attention inputs are not finite"):
        mhconvert.convert(recipe_for(donor, text))


def test_a_cast_that_loses_nothing_is_a_cast() -> None:
    weight = torch.tensor([1.0, -65504.0, 1e-9])
    assert torch.equal(cast("w", weight, torch.float16), weight.half())
    assert torch.equal(cast("w", weight * 1e9, torch.bfloat16), (weight * 1e9).bfloat16())
