"""What a tolerance may say, and how measured figures are held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.convert.recipe.tolerance import parse
from mhconvert.errors import BudgetError, MhconvertError
from mhconvert.run.stage_inputs import of_conversion
from mhconvert.run.whole_recipe import RunRecipe

FOUND = {"kl": 0.05, "perplexity": {"donor": 20.0, "converted": 22.0}}


def test_both_measures_on_held_out_text() -> None:
    kl, ppl = parse("kl=0.05"), parse("ppl=1.05")
    assert (kl.value(FOUND), ppl.value(FOUND)) == (0.05, 1.1)
    assert (kl.allowed, ppl.allowed) == (0.05, pytest.approx(0.05))
    assert ppl.beyond(1.1) == pytest.approx(0.1)
    assert (str(kl), str(ppl)) == ("kl=0.05", "ppl=1.05")
    assert kl.measured(FOUND) == {"measured": 0.05}


def test_a_tolerance_on_what_the_model_writes() -> None:
    generation = parse("generation=0.2")
    assert (str(generation), generation.allowed, generation.on_policy) == ("generation=0.2", 0.2, True)
    found = FOUND | {"on_policy": {"kl": 0.3, "kl_stderr": 0.02, "digest": "own"}}
    assert generation.measured(found) == {"measured": 0.3, "stderr": 0.02, "digest": "own", "kl": 0.05}
    assert (generation.held_out, parse("ppl=1.05").held_out) == (parse("kl=0.2"), parse("ppl=1.05"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl=0", "tolerance 'kl=0' is out of reach: kl must be a number above 0, which is what the donor"),
        ("kl=-1", "kl must be a number above 0"),
        ("generation=0", "generation must be a number above 0"),
        ("ppl=0.9", "ppl must be a number above 1"),
        ("ppl=1", "ppl must be a number above 1"),
        ("kl=nan", "kl must be a number above 0"),
        ("ppl=inf", "ppl must be a number above 1"),
        ("kl=much", "tolerance 'kl=much' has no number; write one such as kl=0.05"),
        ("kl", "tolerance 'kl' is none of kl=NATS, ppl=RATIO and generation=NATS"),
        ("0.05", "none of kl=NATS, ppl=RATIO and generation=NATS, such as kl=0.05, ppl=1.05, gen"),
        ("mse=0.1", "none of kl=NATS, ppl=RATIO and generation=NATS, such as kl=0.05, ppl=1.05, gen"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse(text)
    with pytest.raises(BudgetError, match=message):
        Recipe("tiny", "mla", tolerance=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_budget": 0.3}, r"leave out kv_budget=0\.3 or the tolerance"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 8}, "fix the KV budget; leave them out"),
    ],
)
def test_a_tolerance_and_a_size_are_two_ways_to_say_one_thing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MhconvertError, match=message):
        Recipe("tiny", "mla", settings=MLASettings(**settings), tolerance="kl=0.1")


def test_a_recipe_with_a_tolerance_survives_yaml_types() -> None:
    recipe = Recipe("tiny", "mla", settings=MLASettings(profile="portable"), tolerance="ppl=1.05")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    settled = recipe.at_budget(0.4)
    assert settled == Recipe("tiny", "mla", settings=MLASettings(kv_budget=0.4, profile="portable"))


def test_prompts_are_of_a_tolerance_on_generation(tmp_path: Path) -> None:
    asked = Recipe("tiny", "mla", tolerance="generation=0.2", prompts=Path("mine.txt"))
    assert asked.to_dict()["prompts"] == "mine.txt"
    assert Recipe.from_dict(asked.to_dict()) == asked
    assert asked.at_budget(0.4).prompts is None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert of_conversion(RunRecipe(asked))["text"] == {}
        (tmp_path / "mine.txt").write_text(
            "What is a river?"
        )  # a run repeats what was done with other prompts
        assert of_conversion(RunRecipe(asked))["text"].keys() == {"mine.txt"}
    assert "prompts" not in Recipe("tiny", "mla", tolerance="generation=0.2").to_dict()
    for tolerance in ("kl=0.2", None):
        with pytest.raises(
            MhconvertError, match="prompts are of a tolerance on generation: give generation=NATS"
        ):
            Recipe("tiny", "mla", tolerance=tolerance, prompts="mine.txt")
    with pytest.raises(MhconvertError, match="prompts is empty"):
        Recipe("tiny", "mla", tolerance="generation=0.2", prompts="")


@pytest.mark.parametrize("text", ["ppl=1.0000001", "kl=0.0499999", "kl=0.05", "ppl=1.05", "kl=1e-07"])
def test_a_tolerance_is_written_as_it_was_read(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)
