"""Chains in one conversion: the same tensors as one conversion for each step, done once whatever stops them between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mhconvert
from mhconvert import api
from mhconvert.convert.layer_pass import time_estimate
from mhconvert.convert.methods.registry import settings_class
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.convert.recipe.steps import Step
from mhconvert.convert.storage import disk_space
from mhconvert.errors import MhconvertError, OutputError, UnsupportedError
from mhconvert.progress import Progress
from tests.convert.test_chains import SETTINGS, record
from tests.donors import make_donor

PASS: dict[str, Any] = {
    "effort": "quick",
    "verify": False,
    "calibration": Calibration(tokens=96, sequence_length=32, held_out=2),
}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("chains") / "donor", heads=4, kv_heads=2, hidden=32)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)


def chain_of(model: Path, methods: tuple[str, ...], output: Path, **changes: dict[str, Any]) -> Recipe:
    steps = [Step(name, settings_class(name)(**SETTINGS[name] | changes.get(name, {}))) for name in methods]
    return Recipe(str(model), methods=steps, output=str(output), **PASS)


def by_steps(donor: Path, first: str, then: str, place: Path) -> bytes:
    """The tensors of two conversions, one behind the other."""
    for model, name, output, more in (
        (donor, first, "first", {}),
        (place / "first", then, "then", {"active": 0.5}),
    ):
        settings = settings_class(name)(**SETTINGS[name] | more)
        api.convert(Recipe(str(model), name, settings=settings, output=str(place / output), **PASS))
    return (place / "then" / "model.safetensors").read_bytes()


class Killed(BaseException):
    pass


def test_a_chain_is_its_steps_and_goes_on_behind_the_last_that_is_done(donor: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    asked, told = chain_of(donor, ("dha", "moh"), output, moh={"active": 0.5}), []

    def stop(event: Progress) -> None:
        told.append((event.stage, event.message))
        if event.stage == "layers" and len([each for each in told if each[0] == "done"]) == 1:
            raise Killed

    with pytest.raises(Killed):
        api.convert(asked, on_progress=stop)
    step = tmp_path / "out.step1"
    assert (step / "model.safetensors").is_file()
    assert not output.exists()
    first = json.loads((step / "report.json").read_text(encoding="utf-8"))
    with pytest.raises(OutputError, match=r"out.step1 holds .* a step of a chain; --resume goes on from it"):
        api.convert(asked)
    other = chain_of(donor, ("dha", "moh"), output, dha={"kv_budget": 0.5})
    with pytest.raises(
        OutputError, match="out.step1 was made with another settings; --resume needs the same"
    ):
        api.convert(other, resume=True)
    told.clear()
    report = api.convert(
        asked, resume=True, on_progress=lambda event: told.append((event.stage, event.message))
    )
    assert [text for stage, text in told if stage == "done"] == [str(output)]  # step 1 was not done again
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    assert (output / "model.safetensors").read_bytes() == by_steps(donor, "dha", "moh", tmp_path / "two")
    alone = json.loads((tmp_path / "two" / "then" / "report.json").read_text(encoding="utf-8"))
    for name in ("kl", "perplexity", "kv_bytes_per_token", "parameters", "donor", "chain"):
        assert report[name] == alone[name], name
    assert [each["method"] for each in report["steps"]] == ["dha", "moh"]
    assert report["steps"][0]["seconds"] == first["seconds"] > 0
    assert report["seconds"] == sum(each["seconds"] for each in report["steps"]) > first["seconds"]
    assert report["stage_seconds"]["layers"] > first["stage_seconds"]["layers"]
    assert not any(b".step1" in path.read_bytes() for path in output.iterdir())
    assert api.inspect(str(output))["chain"] == ["dha", "moh"]
    assert mhconvert.load_recipe(output / "recipe.yaml").methods == asked.methods
    assert api.convert(asked, resume=True)["kl"] == report["kl"]  # all is done


def test_a_recipe_with_methods_is_run_once(donor: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    asked = chain_of(donor, ("mla", "moh", "hydra"), output, moh={"active": 0.5})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(asked.to_dict()), encoding="utf-8")
    planned = mhconvert.run(file, dry_run=True)["stages"]
    assert [(each["stage"], each["status"]) for each in planned] == [
        ("convert", "to do"),
        ("adapter", "to do"),
    ]
    assert mhconvert.run(file)["output"] == str(output)
    assert (output / "model.safetensors").read_bytes() == by_steps(donor, "mla", "moh", tmp_path / "two")
    adapter = json.loads((tmp_path / "out-hydra" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["r_par"]) == (str(output), 2)
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out-hydra", "out.run.json"}

    def statuses(*overrides: str) -> list[str]:
        return [each["status"] for each in mhconvert.run(file, overrides)["stages"]]

    assert statuses() == ["skipped", "skipped"]
    assert statuses("methods.2.settings.r_par=3") == ["skipped", "done"]
    assert record(tmp_path / "out-hydra")["recipe"]["settings"]["r_par"] == 3
    with pytest.raises(OutputError, match="out is there already and is not what this recipe makes"):
        statuses("methods.1.settings.active=0.75")


def test_a_plan_reads_no_weights_and_is_what_comes(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=2, hidden=32)
    asked = chain_of(donor, ("swa", "mla", "hydra"), tmp_path / "out")
    weights = (donor / "model.safetensors").read_bytes()
    (donor / "model.safetensors").unlink()
    plan = api.plan(asked)
    assert {path.name for path in tmp_path.iterdir()} == {"donor"}
    assert [(each["donor"], each["output"]) for each in plan["steps"]] == [
        (str(donor), str(tmp_path / "out.step1")),
        (str(tmp_path / "out.step1"), str(tmp_path / "out")),
    ]
    assert plan["method"] == "swa+mla"
    assert plan["disk_needed_bytes"] == max(
        plan["steps"][0]["disk_needed_bytes"],
        plan["steps"][0]["output_bytes"] + plan["steps"][1]["disk_needed_bytes"],
    )
    (donor / "model.safetensors").write_bytes(weights)
    report = api.convert(asked)
    for name in ("kv_bytes_per_token", "parameters"):
        assert plan[name] == report[name], name
    assert [each["method"] for each in report["steps"]] == ["swa", "mla"]
    assert plan["adapter"]["modules"] == report["adapter"]["modules"] != []
    assert plan["adapter"]["output"] == report["adapter"]["output"] == str(tmp_path / "out-hydra")


def test_what_a_later_step_refuses_is_refused_before_the_first(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for methods, changes, words in (
        (("swa", "dha"), {"swa": {"sinks": "learnt"}}, "^dha cannot follow swa with sinks: .* --sinks none"),
        (("dha", "moh"), {"dha": {"fusion": "trained"}}, "mhconvert heal CKPT --fusion 2 first, then moh"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            api.convert(chain_of(donor, methods, tmp_path / "out", **changes))
    (tmp_path / "out-hydra").mkdir()
    with pytest.raises(OutputError, match="out-hydra exists"):
        api.convert(chain_of(donor, ("dha", "hydra"), tmp_path / "out"))
    (tmp_path / "out-hydra").rmdir()
    needed = api.plan(asked := chain_of(donor, ("dha", "moh"), tmp_path / "out"))["disk_needed_bytes"]
    usage = disk_space.shutil._ntuple_diskusage(needed, 1, needed - 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="free and the conversion needs"):
        api.convert(asked)
    with pytest.raises(MhconvertError, match="a curve is of one conversion, not of a chain"):
        api.curve(asked)
    assert list(tmp_path.iterdir()) == []
