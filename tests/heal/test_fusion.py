"""Heads that learn to be one: the donor at the start, alike at the end, and nothing lost when they are averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.methods.dha import register
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import BudgetError, HealError
from mhconvert.heal import fusion
from tests.convert.conversions import converted, donor_model, logits, relative, token_ids
from tests.donors import make_donor

PENDING = DHASettings(0.25, fusion="trained")
NORMED = DHASettings(0.625, fusion="trained")  # all K heads, a quarter of the V heads
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"heads": 4, "kv_heads": 4},
    "grouped": {"heads": 8, "kv_heads": 4, "head_dim": 16},
    "biased": {"heads": 4, "kv_heads": 4, "attention_bias": True},
    "partial": {
        "family": "phi3",
        "heads": 4,
        "kv_heads": 4,
        "pad_token_id": 1,
        "rope": {"partial_rotary_factor": 0.5},
    },
    "normed": {"family": "qwen3", "heads": 4, "kv_heads": 4},
    "normed width": {"family": "olmo2", "heads": 8, "kv_heads": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("most", [2, 4])
def test_the_start_is_the_donor_and_a_round_leaves_fewer_heads(variant: str, most: int) -> None:
    """Check 3: ω = δ, for scalars and for each element; check 8: the heads' turns alone change nothing."""
    donor = donor_model(**VARIANTS[variant])
    model, ids = converted(donor, NORMED if "normed" in variant else PENDING), token_ids(2, 20)
    expected = logits(donor, ids)
    assert relative(logits(model, ids), expected) < 2e-5
    fusion.prepare(model, most)
    assert relative(logits(model, ids), expected) < 2e-5
    student = fusion.FusingStudent(model, 320)
    assert student.fusion_loss() == pytest.approx(1.0)


def stirred(model: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, fusion.Mixing):
            module.omega.data += 0.3 * torch.randn(module.omega.shape, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("most", [2, 4])
def test_equal_mixtures_are_fused_without_loss(variant: str, most: int) -> None:
    """Check 10: L = 0 where all ω of a group are equal, and then one head for each is the same model."""
    settings = NORMED if "normed" in variant else PENDING
    model, ids = converted(donor_model(**VARIANTS[variant]), settings), token_ids(2, 20)
    fusion.prepare(model, most)
    stirred(model)
    student = fusion.FusingStudent(model, 320)
    assert student.fusion_loss() > 0.1
    assert student.end_step(1.0) == {"fusion": 0.0}
    assert student.fusion_loss() < 1e-12
    with torch.no_grad():
        averaged = logits(model, ids)
        before = fusion.cache_elements(model)
        fusion.fuse(model, most)
    assert relative(logits(model, ids), averaged) < 2e-5
    assert fusion.cache_elements(model) < before
    register()
    again = AutoModelForCausalLM.from_config(model.config).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("done", [0.1, 0.35, 0.6])
def test_what_heads_differ_by_is_kept_within_its_bound(done: float) -> None:
    model = converted(donor_model(heads=4, kv_heads=4), PENDING)
    fusion.prepare(model, 4)
    stirred(model)
    student = fusion.FusingStudent(model, 320)
    means = [mixing.omega[mixing.groups[0]].mean(0) for mixing in student.mixings]
    bound = (1 - done / 0.7) ** 2
    assert student.end_step(done)["fusion"] == pytest.approx(bound)
    assert student.fusion_loss() == pytest.approx(bound, rel=1e-4)
    for mixing, mean in zip(student.mixings, means, strict=True):
        torch.testing.assert_close(mixing.omega[mixing.groups[0]].mean(0), mean)


def test_two_rounds_come_to_the_planned_heads() -> None:
    """2 ×, then 4 ×: what one round leaves is where the next begins."""
    model = converted(donor_model(heads=4, kv_heads=4), PENDING)
    assert all(len(set(heads)) == 1 for heads in model.config.k_fusion)
    for _ in range(2):
        assert model.config.k_fusion is not None
        fusion.prepare(model, 2)
        fusion.FusingStudent(model, 320).end_step(1.0)
        fusion.fuse(model, 2)
    assert model.config.k_fusion is model.config.v_fusion is None
    assert model.config.k_head_map == [[0] * 4] * 2 == model.config.v_head_map


def test_a_pair_that_rope_turns_has_one_number() -> None:
    """Check 9: mixing the weights is then mixing the turned keys."""
    mixing = fusion.Mixing([[0, 1]], head_dim=8, tied=8)
    assert mixing.omega.shape == (2, 2, 4)
    assert mixing.element == [0, 1, 2, 3, 0, 1, 2, 3]
    assert fusion.Mixing([[0, 1]], 8, 4).element == [0, 1, 0, 1, 2, 3, 4, 5]
    assert fusion.Mixing([[0, 1]], 8, 0).element == list(range(8))


@pytest.mark.parametrize(
    ("heads", "most", "groups"),
    [
        ([0, 0, 0, 0, 0], 2, [[0, 1], [2, 3], [4]]),
        ([0, 1, 0, 1], 2, [[0, 2], [1, 3]]),
        ([0, 1, 0, 0], 4, [[0, 2, 3], [1]]),
    ],
)
def test_groups_of_a_round(heads: list[int], most: int, groups: list[list[int]]) -> None:
    assert fusion.chunks(heads, most) == groups


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("fusion") / "tiny", heads=4, kv_heads=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(300))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pending(donor: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pending") / "out"
    calibration = Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2)
    settings = DHASettings(0.5, fusion="trained")
    recipe = Recipe(str(donor), "dha", settings, output=str(out), calibration=calibration, device="cpu")
    report = mhconvert.convert(recipe)
    assert report["kl"] < 1e-6  # float32
    assert report["kv_bytes_per_token"]["converted"] >= report["kv_bytes_per_token"]["donor"]
    return out


def settings_of(text: Path, **changes: Any) -> HealSettings:
    options = {"tokens": 4096, "sequence_length": 64, "batch_tokens": 128, "lr": 1e-3, "save_tokens": 1024}
    return HealSettings(data={str(text): 1.0}, **(options | {"fusion": 4} | changes))


def test_a_run_fuses_what_the_plan_said(pending: Path, text: Path, tmp_path: Path) -> None:
    report = mhconvert.heal(str(pending), settings_of(text), output=str(tmp_path / "out"))
    planned = sum(layer["k_heads"] + layer["v_heads"] for layer in report["layers"])
    assert planned == 8  # half of two layers
    assert report["verified"]["cache"]["elements_per_token"] == planned * 16
    assert report["kv_bytes_per_token"]["converted"] == planned * 16 * 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["k_fusion"] is None
    found = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    apart = [entry["fusion"] for entry in found if "fusion" in entry]
    assert len(apart) == 32
    assert apart == sorted(apart, reverse=True)
    assert apart[0] < 1
    assert apart[23:] == [0.0] * 9  # the last three tenths train what is one already


def test_an_interrupted_run_goes_on_to_the_bit(pending: Path, text: Path, tmp_path: Path) -> None:
    whole = mhconvert.heal(str(pending), settings_of(text), output=str(tmp_path / "whole"), verify=False)

    def stop(event: Any) -> None:
        if event.stage == "heal" and event.done >= 2048:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"output": str(tmp_path / "cut"), "verify": False}
    with pytest.raises(KeyboardInterrupt):
        mhconvert.heal(str(pending), settings_of(text), on_progress=stop, **options)
    again = mhconvert.heal(str(pending), settings_of(text), resume=True, **options)
    assert again["kl"] == whole["kl"]


def test_heads_are_fused_on_text_that_the_student_writes(pending: Path, text: Path, tmp_path: Path) -> None:
    settings = settings_of(text, tokens=512, on_policy=0.5)
    report = mhconvert.heal(str(pending), settings, output=str(tmp_path / "out"), verify=False)
    assert sum(report["healing"]["own_texts"].values()) == 4
    assert report["healing"]["own_texts"]["rows"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["k_fusion"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fusion": None}, "still to be fused: say how many become one"),
        ({"train": "lora"}, "--train attention or all"),
        ({"fusion": 1}, "fusion=1 is too small"),
        ({"tokens": 0, "layer_tokens": 512}, "use --tokens"),
    ],
)
def test_what_fusion_does_not_go_with(
    pending: Path, text: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(HealError, match=said):
        mhconvert.heal(str(pending), settings_of(text, **changes), output=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_such_heads_is_refused(donor: Path, text: Path, tmp_path: Path) -> None:
    calibration = Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2)
    recipe = Recipe(
        str(donor),
        "dha",
        DHASettings(0.5),
        output=str(tmp_path / "done"),
        calibration=calibration,
        fit_steps=0,
    )
    mhconvert.convert(recipe)
    with pytest.raises(HealError, match="no heads that are to be fused"):
        mhconvert.heal(str(tmp_path / "done"), settings_of(text), output=str(tmp_path / "out"))


def test_a_uniform_plan_is_not_trained() -> None:
    with pytest.raises(BudgetError, match="closed form"):
        DHASettings(uniform=True, fusion="trained")


def test_the_recipe_keeps_the_choice(tmp_path: Path) -> None:
    from mhconvert.convert.recipe.recipe import load_recipe, save_recipe

    recipe = Recipe("x", "dha", PENDING, heal=HealSettings(tokens=128, fusion=2))
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
