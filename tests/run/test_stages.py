"""A recipe's stages on a tiny donor: done once, done again where something changed, and a subset of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert import api
from mhconvert.errors import MhconvertError, OutputError, RecipeError
from mhconvert.progress import ignore
from mhconvert.run.ledger import Ledger
from mhconvert.run.stage_work import STAGES, Run, export_folder
from mhconvert.run.whole_recipe import RunRecipe
from tests.donors import make_donor
from tests.eval import page_sample

TEXT = "The river ran slowly past the town, and the boats came home. " * 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_donor(folder / "donor", layers=2, kv_heads=2)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def recipe(place: Path, output: Path, **changes: Any) -> Path:
    plain = {
        "model": str(place / "donor"),
        "method": "dha",
        "settings": {"kv_budget": 0.5},
        "calibration": {
            "sources": [str(place / "text.txt")],
            "tokens": 256,
            "sequence_length": 32,
            "held_out": 2,
        },
        "effort": "quick",
        "output": str(output),
        "device": "cpu",
        "heal": {
            "tokens": 512,
            "data": [str(place / "text.txt")],
            "sequence_length": 32,
            "batch_tokens": 128,
            "held_out": 2,
            "epochs": 20,
            "device": "cpu",
        },
        "eval": {
            "suite": "quick",
            "limit": 8,
            "text": str(place / "text.txt"),
            "sequences": 2,
            "sequence_length": 32,
        },
    }
    file = output.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(plain | changes), encoding="utf-8")
    return file


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in result["stages"]}


def test_a_run_is_done_once_and_again_where_something_changed(place: Path, tmp_path: Path) -> None:
    file = recipe(place, tmp_path / "out")
    planned = mhconvert.run(file, dry_run=True)
    assert statuses(planned) == {"convert": "to do", "heal": "to do", "eval": "to do"}
    assert not (tmp_path / "out").exists()

    first = mhconvert.run(file)
    assert statuses(first) == {"convert": "done", "heal": "done", "eval": "done"}
    assert first["output"] == str(tmp_path / "out-healed")
    models = first["evaluation"]["models"]
    assert [model["role"] for model in models] == ["donor", "converted", "healed"]
    for folder in ("out", "out-healed"):
        assert json.loads((tmp_path / folder / "evaluation.json").read_text())["models"] == models
    page = (tmp_path / "out-healed" / "evaluation.html").read_text(encoding="utf-8")
    assert "kv_budget: 0.5" in page
    assert (tmp_path / "out-healed" / "evaluation.md").is_file()

    again = mhconvert.run(file)
    assert set(statuses(again).values()) == {"skipped"}
    assert again["evaluation"] == first["evaluation"]

    changed = mhconvert.run(file, ["heal.tokens=640"])
    assert statuses(changed) == {"convert": "skipped", "heal": "done", "eval": "done"}
    assert changed["evaluation"]["models"][2]["fingerprint"] != models[2]["fingerprint"]

    with pytest.raises(OutputError, match="out is there already and is not what this recipe makes; --force"):
        mhconvert.run(file, ["settings.kv_budget=0.75"])
    forced = mhconvert.run(file, ["settings.kv_budget=0.75"], only=["convert"], force=True)
    assert statuses(forced) == {"convert": "done"}
    assert statuses(mhconvert.run(file, ["settings.kv_budget=0.75"], dry_run=True)) == {
        "convert": "skipped",
        "heal": "to do",
        "eval": "to do",
    }


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_output_that_was_damaged_is_not_taken_for_done(place: Path, tmp_path: Path, by_hand: bool) -> None:
    """Whether the run made it, or `mhconvert DONOR --to METHOD` with the same settings did."""
    file = recipe(place, tmp_path / "out", heal=None, eval=None)
    if by_hand:
        api.convert(mhconvert.load_recipe(file))
    else:
        mhconvert.run(file)
    assert statuses(mhconvert.run(file)) == {"convert": "skipped"}
    with open(tmp_path / "out" / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x55")
    assert statuses(mhconvert.run(file, dry_run=True)) == {"convert": "to do"}
    with pytest.raises(OutputError, match="out is there already and is not what this recipe makes; --force"):
        mhconvert.run(file)


def test_stages_that_cannot_be(place: Path, tmp_path: Path) -> None:
    file = recipe(place, tmp_path / "out", heal=None)
    with pytest.raises(RecipeError, match="the recipe has no stage 'push'; it has convert, eval"):
        mhconvert.run(file, only=["push"])
    with pytest.raises(
        RecipeError, match=r"eval needs the checkpoint .*out, which is not there; run that stage too"
    ):
        mhconvert.run(file, only=["eval"])
    with pytest.raises(
        RecipeError, match="there is no recipe 'smollm2-135m-mlb'.*did you mean smollm2-135m-mla"
    ):
        mhconvert.run("smollm2-135m-mlb")


def test_an_interrupted_run_goes_on(place: Path, tmp_path: Path) -> None:
    whole = mhconvert.run(
        recipe(place, tmp_path / "out", heal=None, effort="default", fit_steps=2, eval=None)
    )
    (tmp_path / "b").mkdir()
    file = recipe(place, tmp_path / "b" / "out", heal=None, effort="default", fit_steps=2, eval=None)

    def stop(event: Any) -> None:
        if event.stage == "layers" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mhconvert.run(file, on_progress=stop)
    assert (tmp_path / "b" / "out.partial").is_dir()
    assert statuses(mhconvert.run(file)) == {"convert": "done"}
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()
        for folder in (tmp_path / "b" / "out", Path(whole["output"]))
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_healing_of_another_checkpoint_starts_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(place, tmp_path / "out", eval=None, verify=False)

    def stop(event: Any) -> None:
        if event.stage == "heal":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mhconvert.run(file, on_progress=stop)
    asked: list[tuple[bool, bool]] = []

    def seen(*_: Any, resume: bool, force: bool, **__: Any) -> dict[str, Any]:
        asked.append((resume, force))
        return {}

    monkeypatch.setattr(api, "heal", seen)
    mhconvert.run(file, only=["heal"])
    (tmp_path / "out.run.json").unlink()
    with open(tmp_path / "out" / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x55")
    mhconvert.run(file, only=["heal"])
    (tmp_path / "out.run.json").unlink()
    (tmp_path / "out-healed").mkdir()  # of another run, which is not replaced
    mhconvert.run(file, only=["heal"])
    assert asked == [(True, False), (False, True), (False, False)]


def test_an_adapter_is_made_evaluated_and_exported(place: Path, tmp_path: Path) -> None:
    plain = {
        "model": str(place / "donor"),
        "method": "hydra",
        "output": str(tmp_path / "adapter"),
        "eval": {"suite": "quick", "limit": 8},
        "export": {"to": "lora"},
    }
    file = tmp_path / "hydra.yaml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    result = mhconvert.run(file)
    assert statuses(result) == {"convert": "done", "eval": "done", "export": "done"}
    donor, adapter = result["evaluation"]["tasks"][0]["metrics"][0]["models"]
    assert (adapter["value"], adapter["difference"], adapter["within_noise"]) == (donor["value"], 0, True)
    assert (tmp_path / "adapter-lora" / "adapter_config.json").is_file()
    assert set(statuses(mhconvert.run(file)).values()) == {"skipped"}


def test_an_export_takes_the_options_of_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    export = api.export

    def seen(*words: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return export(*words, **options)

    monkeypatch.setattr(api, "export", seen)
    chosen = {"to": "deepseek_v3", "pad_row": 320, "engine": "transformers", "dtype": "float32"}
    plan = {"kv_lora_rank": 16, "qk_rope_head_dim": 64, "profile": "portable"}
    make_donor(tmp_path / "donor", layers=2, kv_heads=4, head_dim=64)
    changes = {"model": str(tmp_path / "donor"), "method": "mla", "settings": plan}
    file = recipe(place, tmp_path / "out", heal=None, eval=None, export=chosen, **changes)
    assert set(statuses(mhconvert.run(file)).values()) == {"done"}
    assert (asked["pad_row"], asked["engine"], asked["dtype"]) == (320, "transformers", "float32")
    config = json.loads((tmp_path / "out-deepseek_v3" / "config.json").read_text())
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 320
    assert set(statuses(mhconvert.run(file)).values()) == {"skipped"}
    again = recipe(place, tmp_path / "out", heal=None, eval=None, export=chosen | {"pad_row": 512}, **changes)
    assert statuses(mhconvert.run(again)) == {"convert": "skipped", "export": "done"}


@pytest.mark.parametrize(
    ("export", "name"),
    [
        ({"to": "gguf"}, "out-bf16.gguf"),
        ({"to": "auto", "engine": "llama.cpp", "kind": "q8_0"}, "out-q8_0.gguf"),
        ({"to": "auto", "engine": "vllm"}, "out-auto"),
        ({"to": "youtu"}, "out-youtu"),
        ({"to": "gguf", "output": "mine.gguf"}, "mine.gguf"),
    ],
)
def test_the_name_of_an_export_fits_its_form(tmp_path: Path, export: dict[str, str], name: str) -> None:
    plain = {"model": "x", "method": "mla", "settings": {"profile": "portable"}, "export": export}
    work = Run(RunRecipe.from_dict(plain), tmp_path / "out", Ledger(tmp_path / "out"), False, ignore, [])
    assert export_folder(work).name == name


def test_the_pages_of_a_checkpoint_have_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: page_sample.RESULT)
    (tmp_path / "out").mkdir()
    recipe = RunRecipe.from_dict({"model": "x", "method": "dha", "eval": {"generation": True}})
    work = Run(recipe, tmp_path / "out", Ledger(tmp_path / "out"), False, ignore, [])
    assert STAGES["eval"](work)["result"] == page_sample.RESULT
    for name in ("evaluation.html", "evaluation.md"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "drifts after about 3 tokens" in text
        assert "What does a river do" not in text
        assert "A river runs" not in text


def test_a_ledger_that_cannot_be_read_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "out.run.json").write_text("{")
    assert Ledger(tmp_path / "out").done("convert", {}) is None
    made = tmp_path / "made.json"
    made.write_text("1")
    ledger = Ledger(tmp_path / "out")
    ledger.record("eval", {"a": 1}, made)
    assert Ledger(tmp_path / "out").done("eval", {"a": 1}) is not None
    assert Ledger(tmp_path / "out").done("eval", {"a": 2}) is None
    made.write_text("2")
    assert Ledger(tmp_path / "out").done("eval", {"a": 1}) is None


def test_a_stage_is_done_again_when_what_it_reads_has_changed(place: Path, tmp_path: Path) -> None:
    donor, text, judged = tmp_path / "donor", tmp_path / "text.txt", tmp_path / "judged.txt"
    make_donor(donor, layers=2, kv_heads=2)
    text.write_text(TEXT)
    judged.write_text(TEXT)
    stage = {"text": str(judged), "sequences": 2, "sequence_length": 32}
    calibration = {"sources": [str(text)], "tokens": 256, "sequence_length": 32, "held_out": 2}
    file = recipe(place, tmp_path / "out", heal=None, eval=stage, model=str(donor), calibration=calibration)
    first = mhconvert.run(file)
    assert set(statuses(mhconvert.run(file)).values()) == {"skipped"}
    judged.write_text(TEXT.replace("river", "road"))
    again = mhconvert.run(file)
    assert statuses(again) == {"convert": "skipped", "eval": "done"}
    assert again["evaluation"]["texts"] != first["evaluation"]["texts"]
    text.write_text(TEXT.replace("boats", "carts"))
    assert statuses(mhconvert.run(file, dry_run=True))["convert"] == "to do"
    text.write_text(TEXT)
    assert set(statuses(mhconvert.run(file, dry_run=True)).values()) == {"skipped"}
    make_donor(donor, layers=2, kv_heads=2, seed=9)
    assert set(statuses(mhconvert.run(file, dry_run=True)).values()) == {"to do"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.tasks=[mhconvert_quik]", "lm-eval has no task 'mhconvert_quik'"),
        ("eval.text=[absent.txt]", "text file absent.txt of the recipe's eval is not there"),
        ("eval.dtype=float99", "eval.dtype 'float99' is not one of float32"),
        ("export.to=foo", "to 'foo' is no form of export; choose one of"),
        ("push.repo=me/model", "the recipe pushes, and there is no token"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("mhconvert.run.stage_work.get_token", lambda: None)
    with pytest.raises(MhconvertError, match=message):
        mhconvert.run(recipe(place, tmp_path / "out"), [override])
    assert not (tmp_path / "out").exists()
