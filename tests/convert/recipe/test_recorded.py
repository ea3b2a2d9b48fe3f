"""What an earlier conversion saved means what it meant then; what a user writes has today's defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mhconvert
from mhconvert.convert import finished_conversion
from mhconvert.convert.layer_pass import resumable_run
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe, load_recipe
from mhconvert.convert.recipe.recorded import as_recorded
from mhconvert.errors import OutputError
from mhconvert.run.whole_recipe import load
from tests.convert.test_pipeline import stop_after

Build = Callable[..., Recipe]
SINCE = ("kv_bits", "plan")  # settings of mla that conversions did not always save
OLD = {"kv_budget": 0.5, "kv_lora_rank": None, "qk_rope_head_dim": None, "profile": "quality"}


def test_settings_that_a_record_lacks_mean_what_was_done_then() -> None:
    old: dict[str, Any] = {"model": "x", "method": "mla", "settings": OLD}
    assert as_recorded(old)["settings"] == OLD | {"kv_bits": "16", "plan": None}
    assert old["settings"] is OLD
    assert "kv_bits" not in OLD
    new = {"model": "x", "method": "mla", "settings": OLD | {"kv_bits": "auto", "plan": None}}
    assert as_recorded(new) == new
    assert Recipe.from_dict(as_recorded(old)).settings == MLASettings(kv_bits="16")


@pytest.mark.parametrize(
    "values", [None, [], {}, {"method": "mqa", "settings": {}}, {"method": "mla", "settings": None}]
)
def test_what_is_no_recipe_stays_as_it_is(values: Any) -> None:
    assert as_recorded(values) == values


def test_other_methods_have_nothing_to_complete() -> None:
    values = {"method": "moh", "settings": {"active": 0.5}}
    assert as_recorded(values) == values
    values = {"method": "dha", "settings": {"kv_budget": 0.5}}
    assert as_recorded(values) == {"method": "dha", "settings": {"kv_budget": 0.5, "equal_heads": False}}


def test_a_recipe_beside_its_record_was_saved(tmp_path: Path) -> None:
    """The same text is read as a user's where no conversion has written beside it, or under another name."""
    text = yaml.safe_dump({"model": "x", "method": "mla", "settings": OLD})
    saved = tmp_path / "recipe.yaml"
    saved.write_text(text, encoding="utf-8")
    assert load_recipe(saved).settings.kv_bits == "auto"
    (tmp_path / "mhconvert.json").write_text("{}", encoding="utf-8")
    assert load_recipe(saved).settings.kv_bits == "16"
    assert load(saved).convert.settings.kv_bits == "16"
    assert load(saved, ["settings.kv_bits=auto"]).convert.settings.kv_bits == "auto"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml").settings.kv_bits == "auto"


def make_old(file: Path, *keys: str) -> None:
    """Take what is new out of the settings at `keys` of a JSON file."""
    values = inner = json.loads(file.read_text(encoding="utf-8"))
    for key in (*keys, "settings"):
        inner = inner[key]
    for name in SINCE:
        del inner[name]
    file.write_text(json.dumps(values), encoding="utf-8")


def test_a_finished_conversion_is_recognised_by_its_old_record(recipe: Build, tmp_path: Path) -> None:
    asked = recipe(tmp_path / "out", effort="quick", fit_steps=0)
    coded = recipe(tmp_path / "out", effort="quick", fit_steps=0, settings=MLASettings(kv_bits="auto"))
    mhconvert.convert(asked)
    assert "kv_bits: '16'" in (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    make_old(tmp_path / "out" / "mhconvert.json", "recipe")
    assert finished_conversion.written(asked) == str(tmp_path / "out")
    assert finished_conversion.written(coded) is None
    searched = dataclasses.replace(asked, tolerance="kl=9", settings=MLASettings(kv_bits="16"))
    assert finished_conversion.is_result(tmp_path / "out", searched)  # whatever budget the search found
    assert not finished_conversion.is_result(tmp_path / "out", dataclasses.replace(searched, seed=1))


def test_an_interrupted_conversion_goes_on_from_its_old_state(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_run, "COMMIT_SHARE", 1e9)  # every layer is kept, on a busy machine too
    options: dict[str, Any] = {"effort": "quick", "fit_steps": 0}
    asked = recipe(tmp_path / "out", **options)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(asked, on_progress=stop_after(2, KeyboardInterrupt()))
    [state] = (tmp_path / "out.partial").rglob("state.json")
    make_old(state, "recipe")
    with pytest.raises(OutputError, match="was started with another settings"):
        mhconvert.convert(recipe(tmp_path / "out", **options, settings=MLASettings()), resume=True)
    first: list[int] = []
    mhconvert.convert(
        asked, resume=True, on_progress=lambda e: first.append(e.done) if e.stage == "layers" else None
    )
    assert first[0] > 0  # it did not begin again


def test_a_portable_conversion_says_that_it_has_elements(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: x\nmethod: mla\nsettings: {profile: portable}\n", encoding="utf-8")
    assert load_recipe(file).to_dict()["settings"]["kv_bits"] == "16"
