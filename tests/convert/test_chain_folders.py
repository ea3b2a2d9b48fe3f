"""The folders of a chain: what is read is never replaced, what was begun for another chain is not gone on with, and
nothing of ours is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import mhconvert
from mhconvert import api
from mhconvert.convert.layer_pass import resumable_run, time_estimate
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.convert.storage import ownership, step_folder
from mhconvert.errors import MhconvertError, OutputError
from mhconvert.progress import Progress
from tests.convert.test_chains import recipe_of
from tests.convert.test_whole_chains import Killed, chain_of
from tests.donors import make_donor

ACTIVE = {"active": 0.5}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("folders") / "donor", heads=4, kv_heads=2, hidden=32)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def marked(folder: Path) -> Path:
    folder.mkdir()
    ownership.mark(folder, "convert")
    return folder


def killed_in_the_second_pass(asked: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its first layer, which is durable."""
    done: list[str] = []

    def stop(event: Progress) -> None:
        done.extend([event.stage] if event.stage == "done" else [])
        if done and event.stage == "layers" and event.done == 1:
            raise Killed

    monkeypatch.setattr(resumable_run, "COMMIT_SHARE", 1e9)
    with pytest.raises(Killed):
        api.convert(asked, on_progress=stop)


@pytest.mark.parametrize("place", ["m-hydra", "m"])
def test_a_donor_in_the_place_of_what_is_written_stays(donor: Path, tmp_path: Path, place: str) -> None:
    read = shutil.copytree(donor, tmp_path / place)
    asked = chain_of(read, ("dha", "moh", "hydra"), tmp_path / "m")
    for work in (api.plan, lambda recipe: api.convert(recipe, force=True)):
        with pytest.raises(OutputError, match=f"{place} is read by this command"):
            work(asked)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(asked.to_dict()), encoding="utf-8")
    with pytest.raises(OutputError, match=f"{place} is read by this command"):
        mhconvert.run(file, force=True)
    assert names(read) == names(donor)
    assert names(tmp_path) == {place, "recipe.yaml"}


def test_the_donor_of_a_donor_stays_too(donor: Path, tmp_path: Path) -> None:
    first = shutil.copytree(donor, tmp_path / "m-hydra")
    api.convert(recipe_of(first, "dha", tmp_path / "small"))
    asked = chain_of(tmp_path / "small", ("moh", "hydra"), tmp_path / "m")
    for work in (api.plan, lambda recipe: api.convert(recipe, force=True)):
        with pytest.raises(OutputError, match="m-hydra is read by this command"):
            work(asked)
    assert names(tmp_path) == {"m-hydra", "small"}


def test_only_what_was_begun_for_the_same_chain_is_gone_on_with(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its output is spelled; behind a step that is made again all is done again."""
    killed_in_the_second_pass(chain_of(donor, ("dha", "moh"), tmp_path / "out", moh=ACTIVE), monkeypatch)
    state = json.loads((tmp_path / "out.partial" / "work" / "state.json").read_text(encoding="utf-8"))
    assert state["recipe"]["model"] == str(donor)
    assert [step["method"] for step in state["recipe"]["methods"]] == ["dha", "moh"]
    assert len(state["layers"]) == 1
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    monkeypatch.chdir(tmp_path)
    told: list[int] = []

    def tell(event: Progress) -> None:
        told.extend([event.done] if event.stage == "layers" else [])

    api.convert(chain_of(donor, ("dha", "moh"), Path("out"), moh=ACTIVE), resume=True, on_progress=tell)
    assert told == [1, 2]
    told.clear()
    other = chain_of(donor, ("dha", "moh"), Path("other"), dha={"kv_budget": 0.5}, moh=ACTIVE)
    api.convert(other, resume=True, on_progress=tell)
    assert told == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("left", "ours", "said"),
    [
        ("out.unhealed", True, "out.unhealed holds a conversion that is not healed yet"),
        ("out.unhealed", False, "out.unhealed is not the work of mhconvert"),
        (
            "out.unhealed.partial",
            True,
            "out.unhealed.partial holds an interrupted run; --resume continues it",
        ),
        ("out.partial", True, "out.partial holds an interrupted run of another command; --force starts over"),
        ("out.step1.partial", False, "out.step1.partial is not the work of mhconvert"),
        ("out-hydra.partial", True, "out-hydra.partial is there already: --force starts over"),
        (None, True, "absent.txt"),
    ],
)
def test_nothing_is_converted_before_all_places_are_free(
    donor: Path, tmp_path: Path, left: str | None, ours: bool, said: str
) -> None:
    text = tmp_path / "absent.txt"
    if left:
        (tmp_path / left).mkdir()
        (tmp_path / left / "notes.txt").write_text("mine")
        if ours:
            ownership.mark(tmp_path / left, "convert")
        text.write_text("The river runs to the sea. " * 99)
    before = names(tmp_path)
    asked = chain_of(donor, ("dha", "moh", "hydra"), tmp_path / "out")
    heal = HealSettings(tokens=64, data={str(text): 1.0})
    with pytest.raises(MhconvertError, match=said):
        api.convert(Recipe(**{**vars(asked), "method": "", "settings": None, "heal": heal}))
    assert names(tmp_path) == before


def test_no_step_is_left_behind(donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, theirs = tmp_path / "out", tmp_path / "out.step9"
    theirs.mkdir()
    asked = chain_of(donor, ("dha", "moh"), output, moh=ACTIVE)
    with monkeypatch.context() as killed:
        killed.setattr(step_folder, "remove_step", lambda _: None)
        api.convert(asked)
    unhealed, longer = marked(tmp_path / "out.unhealed"), marked(tmp_path / "out.step7")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(asked.to_dict()), encoding="utf-8")
    kept = {"out", theirs.name, unhealed.name, file.name}
    mhconvert.run(file, dry_run=True)
    assert names(tmp_path) == kept | {"out.step1", longer.name}
    assert [stage["status"] for stage in mhconvert.run(file)["stages"]] == ["skipped"]
    assert names(tmp_path) == kept
    marked(longer)
    api.convert(asked, resume=True)
    assert names(tmp_path) == kept
