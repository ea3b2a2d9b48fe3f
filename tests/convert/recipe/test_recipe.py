"""Recipes survive YAML, and what no recipe has is refused."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe, save_recipe
from mhconvert.errors import BudgetError, MhconvertError

RECIPES = Path(str(files("mhconvert.recipes")))
PLAIN = {"model": "smollm2-135m", "method": "mla"}
EVERYTHING = Recipe(
    model="org/name@main",
    method="mla",
    settings=MLASettings(kv_lora_rank=88, qk_rope_head_dim=32, profile="portable"),
    output="out/ä folder",
    calibration=Calibration(sources=("a.txt", "b/*.jsonl"), tokens=4096, sequence_length=128, held_out=3),
    effort="high",
    fit_steps=0,
    seed=7,
    dtype="bfloat16",
    device="cpu",
    max_shard_size="500MB",
    verify=False,
    trust_remote_code=True,
    heal=HealSettings(
        tokens="20M", data={"a.txt": 2.0, "self": 1.0}, loss={"kl": 1.0, "ce": 0.1}, train="lora"
    ),
)


@pytest.mark.parametrize("recipe", [Recipe(**PLAIN), EVERYTHING], ids=["plain", "everything"])
def test_the_yaml_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_choice_differs_from_its_default_in_the_round_trip() -> None:
    plain = Recipe(**PLAIN)
    same = [
        f.name for f in dataclasses.fields(Recipe) if getattr(plain, f.name) == getattr(EVERYTHING, f.name)
    ]
    # a tolerance, of prompts, stands instead of sizes: test_tolerance.py; methods instead of a method: test_steps.py
    assert same == ["method", "tolerance", "methods", "prompts"]


def test_defaults() -> None:
    recipe = Recipe.from_dict(PLAIN)
    assert recipe.settings == MLASettings()
    assert recipe.calibration.sources == ("self",)
    assert recipe.output_folder("smollm2-135m") == Path("smollm2-135m-mla")
    assert EVERYTHING.output_folder("x") == Path("out/ä folder")
    assert Recipe.from_dict(PLAIN | {"calibration": {"sources": "a.txt"}}).calibration.sources == ("a.txt",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.5}, "recipe has no key 'budget'; it has calibration, device,"),
        (
            {"settings": {"rank": 3}},
            "settings has no key 'rank'; it has kv_bits, kv_budget, kv_lora_rank, plan, profile,",
        ),
        ({"calibration": {"files": []}}, "calibration has no key 'files'; it has held_out, sequence_length,"),
        ({"method": "mqa"}, "unknown method 'mqa'; choose one of mla"),
        ({"effort": "some"}, "effort: 'some' is not one of quick, default, high"),
        ({"seed": -1}, "seed=-1 is not between 0 and 4294967295"),
        ({"seed": 2**64}, "is not between 0 and 4294967295"),
        (
            {"heal": {"token": 5}},
            r"heal has no key 'token'; did you mean tokens or lm_tokens\? \(it has batch_tokens,",
        ),
        ({"heal": {"tokens": "lots"}}, "tokens 'lots' is not a number of tokens such as 200k or 20M"),
        ({"fit_steps": -1}, "fit_steps=-1 is negative; 0 means the closed form alone"),
        ({"fit_steps": "many"}, "fit_steps: 'many' is not a whole number"),
        ({"fit_steps": True}, "fit_steps: true is not a whole number"),
        ({"verify": "no"}, "verify: 'no' is not true or false"),
        ({"heal": "20M"}, "heal: '20M' is not a mapping of settings"),
        ({"calibration": {"sources": ["a.txt", 5]}}, "calibration.sources: 5 is not text"),
        ({"kv_budget": 0.5}, r"recipe has no key 'kv_budget'; did you mean settings\.kv_budget\? \(it has"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MhconvertError, match=message):
        Recipe.from_dict(PLAIN | change)


def test_a_recipe_without_a_model() -> None:
    with pytest.raises(MhconvertError, match=r"recipe: .*'model'"):
        Recipe.from_dict({"method": "mla"})
    with pytest.raises(
        MhconvertError,
        match="the method is missing; choose one of mla, dha, moh, swa, mla\+swa, hybrid, hydra",
    ):
        Recipe.from_dict({"model": "x"})


def test_a_setting_out_of_range() -> None:
    with pytest.raises(BudgetError, match=r"kv_budget=3 is outside"):
        Recipe.from_dict(PLAIN | {"settings": {"kv_budget": 3}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "cannot be read"),
        ("- a\n- b", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("model: !!python/object/apply:os.system [echo]", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MhconvertError, match=message) as caught:
        load_recipe(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MhconvertError, match=r"none\.yaml cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_ship_are_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    plain = str(recipe.output_folder(recipe.model)).replace("+", "-")
    assert path.stem.removeprefix(plain) in ("", "-healed", "-coded", "-portable")


def test_paths_are_taken_as_text() -> None:
    calibration = Calibration(sources=[Path("a.txt"), "b.txt"])
    recipe = Recipe(Path("x"), "mla", output=Path("out"), calibration=calibration)  # type: ignore[arg-type]
    assert (recipe.model, recipe.output, recipe.calibration.sources) == ("x", "out", ("a.txt", "b.txt"))
    with pytest.raises(MhconvertError, match="output=3 is not text"):
        Recipe("x", "mla", output=3)  # type: ignore[arg-type]
