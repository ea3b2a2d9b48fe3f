"""Converted checkpoints as donors: the table, whole chains on disk, their records, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert import open_model
from mhconvert.convert.methods import combinations
from mhconvert.convert.methods.registry import METHOD_NAMES, settings_class
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import HealError, UnsupportedError
from tests.convert.conversions import logits, token_ids
from tests.donors import make_donor

SETTINGS: dict[str, dict[str, Any]] = {
    "dha": {"kv_budget": 0.75},
    "mla": {"kv_budget": 0.75, "kv_bits": "16"},
    "moh": {"active": 1.0},
    "swa": {"window": 16, "context": 64, "sinks": "none"},
    "hydra": {"r_par": 2, "r_seq": 2},
}
SHARES_AFTER_SWA = {"donor": 1, "converted": 0.75}  # of what `swa` leaves, by the budgets above
PASS: dict[str, Any] = {
    "effort": "quick",
    "verify": False,
    "calibration": Calibration(tokens=256, sequence_length=64, held_out=2),
}
Convert = Callable[..., Path]


def recipe_of(model: Path, method: str, output: Path, **changes: Any) -> Recipe:
    settings = settings_class(method)(**SETTINGS[method] | changes)
    return Recipe(
        str(model), method, settings=settings, output=str(output), **({} if method == "hydra" else PASS)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny donor and of what is made from it."""
    folder = tmp_path_factory.mktemp("chains")
    make_donor(folder / "donor", heads=4, kv_heads=2, hidden=32)
    return folder


@pytest.fixture(scope="module")
def made(root: Path) -> Convert:
    """Convert one folder into another, once for each pair of names."""

    def convert(model: str, method: str) -> Path:
        output = root / f"{model}-{method}"
        if not output.exists():
            api.convert(recipe_of(root / model, method, output))
        return output

    return convert


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mhconvert.json").read_text(encoding="utf-8"))
    return found


def adapter_of(base: Path, output: Path) -> Any:
    """A LoRA that changes what the model in `base` computes, saved in `output`; the adapted model."""
    config = LoraConfig(
        r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = str(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(open_model.open_model(str(base)).model(), config)
    adapted.save_pretrained(output)
    return adapted.eval()


def test_every_pair_is_in_the_table_once() -> None:
    rows = [(first, then) for row in combinations.TABLE for first in row.firsts for then in row.thens]
    assert sorted(rows) == sorted(
        {(first, then) for first in combinations.FIRSTS for then in combinations.KINDS}
    )
    assert {kind.split(" ")[0] for kind in combinations.KINDS} == set(METHOD_NAMES)
    assert all((row.exact is None) == bool(row.refused) for row in combinations.TABLE)
    assert "nothing is known" in str(combinations.refusal(["dha"], "other"))


@pytest.mark.parametrize("first", ["dha", "mla", "swa"])
def test_moh_with_all_heads_is_the_checkpoint(first: str, root: Path, made: Convert) -> None:
    donor, result = made("donor", first), made(f"donor-{first}", "moh")
    both = [open_model.open_model(str(folder)).model() for folder in (donor, result)]
    ids = token_ids(2, 40)
    assert torch.equal(logits(both[1], ids), logits(both[0], ids))
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    held = json.loads((donor / "report.json").read_text(encoding="utf-8"))["kv_bytes_per_token"]
    assert report["kv_bytes_per_token"] == held
    assert record(result)["donor"]["reference"] == str(root / "donor") == report["donor"]
    assert (
        [step["method"] for step in record(result)["chain"]]
        == [first]
        == [s["method"] for s in report["chain"]]
    )
    assert open_model.recorded_donor(str(result)) == str(root / "donor")
    label = {"dha": "DHA", "mla": "MLA", "swa": "SWA"}[first]
    assert f"rewritten as {label}, then MoH" in (result / "README.md").read_text(encoding="utf-8")


def test_a_chain_is_measured_against_its_first_donor(root: Path, made: Convert) -> None:
    """With all heads the result is the checkpoint, whose distance from its donor is what the report has."""
    report = json.loads((made("donor-dha", "moh") / "report.json").read_text(encoding="utf-8"))
    assert report["kl"] > 1e-3
    assert report["perplexity"]["donor"] != report["perplexity"]["converted"]


def test_the_chain_is_inspected_and_reloads(made: Convert, root: Path) -> None:
    folder = made("donor-mla", "moh")
    found = api.inspect(str(folder))
    assert found["chain"] == ["mla", "moh"]
    assert found["first_donor"] == str(root / "donor")
    assert found["attention"]["kind"] == "latent (MLA) and mixture of heads (MoH)"
    assert {"kv_lora_rank", "active_heads"} <= found["attention"].keys()
    assert (
        found["kv"]["elements_per_token"]
        == api.inspect(str(made("donor", "mla")))["kv"]["elements_per_token"]
    )
    assert {name for name, method in found["methods"].items() if method["applies"]} == {"hydra"}
    assert api.verify(str(folder))["relative_difference"] == 0  # a bare process runs what the folder ships


@pytest.mark.parametrize("then", ["mla", "dha"])
def test_windows_of_a_checkpoint_stay(then: str, root: Path, made: Convert) -> None:
    held = json.loads((made("donor", "swa") / "report.json").read_text(encoding="utf-8"))
    folder = made("donor-swa", then)
    config = open_model.open_model(str(folder)).config
    assert config.model_type == f"{then}_cwm"
    assert "sliding_attention" in config.layer_types
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sizes = {side: held["kv_bytes_per_token"][side] * share for side, share in SHARES_AFTER_SWA.items()}
    assert report["kv_bytes_per_token"] == pytest.approx(sizes)
    assert report["cache_context"] == record(folder)["cache_context"] == held["cache_context"] == 64
    plan = api.plan(recipe_of(root / "donor-swa", then, root / "planned"))
    assert plan["cache_context"] == 64
    assert ("cache_estimate" in plan) == (then == "dha")  # quick mla gives all layers the same
    assert config.layer_types == ["sliding_attention"] * 2
    assert api.inspect(str(folder))["attention"]["sliding_window"] == 16
    assert plan["kv_bytes_per_token"]["converted"] == report["kv_bytes_per_token"]["converted"]


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (
            "dha",
            "mla",
            "mla cannot follow dha: both rewrite keys and values; convert the donor .* began with .*donor",
        ),
        ("mla", "mla", "mla cannot follow mla: both rewrite keys and values"),
        ("dha", "swa", "take the other order, swa and then dha"),
        ("mla", "swa", "take the other order, swa and then mla, or one conversion --to mla.swa"),
        ("swa", "swa", "both decide which layers have windows"),
    ],
)
def test_what_cannot_follow_is_refused(first: str, then: str, words: str, root: Path, made: Convert) -> None:
    folder = made("donor", first)
    with pytest.raises(UnsupportedError, match=f"was made by {first}, and .*{words}"):
        api.convert(recipe_of(folder, then, root / "refused"))
    assert not (root / "refused").exists()


def test_a_third_step_is_held_against_every_earlier_one(root: Path, made: Convert) -> None:
    made("donor", "dha")
    with pytest.raises(UnsupportedError, match="made by dha and then moh, and moh cannot follow moh"):
        api.convert(recipe_of(made("donor-dha", "moh"), "moh", root / "refused"))
    with pytest.raises(UnsupportedError, match="dha cannot follow dha"):
        api.convert(recipe_of(made("donor-dha", "moh"), "dha", root / "refused"))


def test_codes_and_sinks_are_refused_with_what_to_take(root: Path) -> None:
    api.convert(Recipe(str(root / "donor"), "mla", output=str(root / "coded"), **PASS))
    with pytest.raises(
        UnsupportedError, match=r"follow mla \(coded\): .* --to mla --kv-bits 16, and then moh"
    ):
        api.convert(recipe_of(root / "coded", "moh", root / "refused"))
    api.convert(recipe_of(root / "donor", "swa", root / "sinks", sinks="learnt"))
    with pytest.raises(UnsupportedError, match="convert the donor with --to swa --sinks none"):
        api.convert(recipe_of(root / "sinks", "dha", root / "refused"))


@pytest.mark.parametrize("form", ["llama", "nemotron-nas"])
def test_an_export_ends_a_chain(form: str, root: Path) -> None:
    folder = root / "equal"
    if not folder.exists():
        api.convert(recipe_of(root / "donor", "dha", folder, kv_budget=0.5, equal_heads=True))
    api.export(str(folder), form, str(root / form), verify=False)
    with pytest.raises(UnsupportedError, match=f"is an export, which ends a chain; convert {folder} instead"):
        api.convert(recipe_of(root / form, "moh", root / "refused"))


@pytest.mark.parametrize("first", ["dha", "mla", "swa"])
def test_adapters_of_converted_checkpoints_merge(first: str, root: Path, made: Convert) -> None:
    base = made("donor", first)
    expected = logits(adapter_of(base, root / f"lora-{first}"), token_ids(1, 20))
    api.merge(str(root / f"lora-{first}"), str(root / f"merged-{first}"))
    merged = AutoModelForCausalLM.from_pretrained(root / f"merged-{first}", trust_remote_code=True)
    assert torch.allclose(logits(merged, token_ids(1, 20)), expected, atol=1e-4)  # W + BA in one product
    assert [step["method"] for step in record(root / f"merged-{first}")["chain"]] == [first]
    assert record(root / f"merged-{first}").get("cache_context") == record(base).get("cache_context")
    with pytest.raises(HealError, match=f"{base}, which it was .* would teach it to undo .* --teacher"):
        api.heal(str(root / f"merged-{first}"), HealSettings(tokens=64), output=str(root / "healed"))
    api.convert(recipe_of(root / f"merged-{first}", "moh", root / f"merged-{first}-moh"))
    assert api.inspect(str(root / f"merged-{first}-moh"))["chain"] == [first, "lora", "moh"]
    api.convert(recipe_of(base, "hydra", root / f"hydra-{first}"))
    assert api.merge(str(root / f"hydra-{first}"), str(root / f"untrained-{first}"))["modules"]


def test_a_merged_adapter_begins_what_is_measured(root: Path) -> None:
    adapter_of(root / "donor", root / "tuning")
    tuned = root / "tuned"
    api.merge(str(root / "tuning"), str(tuned))
    assert open_model.recorded_donor(str(tuned)) == str(root / "donor")
    api.convert(recipe_of(tuned, "dha", root / "tuned-dha", kv_budget=1.0))
    api.convert(recipe_of(root / "tuned-dha", "moh", root / "tuned-moh"))
    for name, made_by in (("tuned-dha", ["lora", "dha"]), ("tuned-moh", ["lora", "dha", "moh"])):
        report = json.loads((root / name / "report.json").read_text(encoding="utf-8"))
        assert report["donor"] == record(root / name)["donor"]["reference"] == str(tuned)
        assert report["kl"] < 1e-6  # all that the tuned model has is kept
        found = api.inspect(str(root / name))
        assert (found["first_donor"], found["chain"]) == (str(root / "donor"), made_by)
        assert open_model.recorded_donor(str(root / name)) == str(tuned)  # whom `heal` takes as the teacher
    assert "rewritten as DHA, then MoH" in (root / "tuned-moh" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lost", ["weights", "place"])
def test_a_first_donor_that_is_lost_is_named(lost: str, tmp_path: Path) -> None:
    donor, middle = make_donor(tmp_path / "donor", heads=4, kv_heads=2, hidden=32), tmp_path / "middle"
    api.convert(recipe_of(donor, "dha", middle))
    if lost == "weights":
        (donor / "model.safetensors").unlink()
    else:
        make_donor(donor, heads=4, kv_heads=2, hidden=32, layers=3)
    report = api.convert(recipe_of(middle, "moh", tmp_path / "last"))
    assert f"the chain began with {donor}, which is not at hand" in report["notice"]
    assert report["donor"] == record(tmp_path / "last")["donor"]["reference"] == str(middle)
    assert report["kl"] < 1e-6
