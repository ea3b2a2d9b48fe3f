"""Decoupled heads through the whole pass: what is written, measured, resumed and planned again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mhconvert
from mhconvert.convert.attention.rotary import layer_rotary
from mhconvert.convert.methods.dha.method import DHA
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.dha.surgery import fuse
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import OutputError
from mhconvert.eval import inspection
from tests.conftest import Cli
from tests.convert.conversions import (
    assembled,
    attention_inputs,
    converted,
    converted_layers,
    donor_model,
    logits,
    relative,
    token_ids,
)
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_donor

LAYERS, HEADS, WIDTH = 3, 4, 16


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-head attention."""
    return make_donor(tmp_path_factory.mktemp("dha") / "tiny", layers=LAYERS, heads=HEADS, kv_heads=HEADS)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, **changes: Any) -> Recipe:
        options = {
            "settings": DHASettings(0.5),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 3,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(**({"model": str(donor), "method": "dha", "output": str(output)} | options | changes))

    return build


def heads_of(report: dict[str, Any]) -> list[int]:
    return [layer["k_heads"] + layer["v_heads"] for layer in report["layers"]]


def test_the_cache_that_generate_leaves_has_the_planned_heads(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Checks 11 and 12, in a process that has no mhconvert."""
    report = mhconvert.convert(recipe(tmp_path / "out", verify=True))
    assert sum(heads_of(report)) == LAYERS * HEADS  # half of K and V
    assert report["verified"]["cache"]["elements_per_token"] == LAYERS * HEADS * WIDTH
    assert report["kv_bytes_per_token"]["converted"] == report["kv_bytes_per_token"]["donor"] / 2
    assert report["verified"]["module"] == "transformers_modules"
    assert report["verified"]["relative_logit_error"] < 1e-5  # float32, three layers
    for layer in report["layers"]:
        assert layer["kv_elements"]["converted"] == (layer["k_heads"] + layer["v_heads"]) * WIDTH
        assert 0 <= layer["relative_error"] < 1
    facts = inspection.inspect(str(tmp_path / "out"))
    assert facts["kv"]["elements_per_token"] == LAYERS * HEADS * WIDTH
    assert facts["converted_by"] == "dha"


def test_a_full_budget_is_the_donor_and_divergence_falls_towards_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    found = [
        mhconvert.convert(recipe(tmp_path / str(share), settings=DHASettings(share), fit_steps=0))["kl"]
        for share in (0.25, 0.5, 0.75, 1.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1e-3
    assert found[-1] < 1e-9


def test_resume_gives_the_same_bytes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mhconvert.convert(recipe(tmp_path / "whole"))
    cut = recipe(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(2, KeyboardInterrupt()))
    mhconvert.convert(cut, resume=True)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("source", ["mhconvert.json", "report.json", "dry run"])
def test_a_plan_can_be_used_again(recipe: Callable[..., Recipe], tmp_path: Path, source: str) -> None:
    first = mhconvert.convert(recipe(tmp_path / "first"))
    plan = tmp_path / "first" / source
    if source == "dry run":
        found = mhconvert.plan(recipe(tmp_path / "again"), survey=True)
        assert [layer["kv_heads"] for layer in found["layers"]] == heads_of(first)
        assert found["kv_elements_per_token"]["converted"] == LAYERS * HEADS * WIDTH
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps(found))
    again = mhconvert.convert(recipe(tmp_path / "again", settings=DHASettings(plan=str(plan))))
    assert heads_of(again) == heads_of(first)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "first")


def test_an_edited_plan_is_obeyed(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    layers = [{"k_map": [0, 1, 1, 0], "v_map": [0, 0, 0, 0]}, {"k_heads": 1, "v_heads": 3}, {"kv_heads": 8}]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": layers}))
    report = mhconvert.convert(recipe(tmp_path / "out", settings=DHASettings(plan=str(plan))))
    assert [(layer["k_heads"], layer["v_heads"]) for layer in report["layers"]] == [(2, 1), (1, 3), (4, 4)]
    assert (report["layers"][0]["k_map"], report["layers"][0]["v_map"]) == ([0, 1, 1, 0], [0, 0, 0, 0])


def test_a_uniform_plan_is_stock_grouped_query_attention(
    recipe: Callable[..., Recipe], donor: Path, tmp_path: Path
) -> None:
    """Check 4: the donor's own class, in a process without mhconvert and without remote code."""
    out = tmp_path / "out"
    report = mhconvert.convert(recipe(out, settings=DHASettings(0.5, uniform=True), verify=True))
    assert heads_of(report) == [HEADS] * LAYERS
    assert report["verified"]["module"].startswith("transformers")
    assert report["verified"]["module"] != "transformers_modules"
    assert report["verified"]["relative_logit_error"] < 1e-5
    assert report["verified"]["cache"]["elements_per_token"] == LAYERS * HEADS * WIDTH
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 2
    assert "auto_map" not in config
    assert "trust_remote_code" not in (out / "README.md").read_text()
    before, after = load_file(donor / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not any(loading.values())


def test_a_uniform_plan_of_a_donor_whose_projections_are_one_matrix(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out, donor = tmp_path / "out", make_donor(tmp_path / "donor", heads=4, kv_heads=4, **PARTIAL)
    report = mhconvert.convert(
        recipe(out, model=str(donor), settings=DHASettings(0.5, uniform=True), verify=True)
    )
    assert report["verified"]["model_class"] == "Phi3ForCausalLM"
    assert report["verified"]["relative_logit_error"] < 1e-5
    assert not list(out.glob("*.py"))
    before, after = load_file(donor / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert (before[name].shape[0], after[name].shape[0]) == (3 * 4 * WIDTH, (4 + 2 * 2) * WIDTH)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_uniform_layer_computes_what_decoupled_heads_of_its_maps_do(seed: int) -> None:
    """Query heads in another order, and o_proj's columns with them, are the same layer."""
    donor, ids = donor_model(seed, heads=6, kv_heads=6, hidden=96), token_ids(4, 32)
    method = DHA(donor.config, DHASettings(0.34, uniform=True), "quick")
    for index, (layer, x) in enumerate(zip(donor.model.layers, attention_inputs(donor, ids), strict=True)):
        rotary = layer_rotary(donor.model.rotary_emb, donor.config, index, 32)
        seen = method.observe(layer.self_attn, x, rotary)
        clusters = seen.split("kv", 2, True, equal=True)
        assert sorted(map(len, clusters)) == [3, 3]
        fused = fuse(seen.heads, clusters, clusters)
        apart, stock = (
            method._module(one, seen, index, torch.device("cpu")) for one in (fused, fused.in_groups())
        )
        assert stock.stock
        assert relative(stock(x, rotary.embeddings)[0], apart(x, rotary.embeddings)[0]) < 2e-6


PARTIAL = {"family": "phi3", "pad_token_id": 1, "rope": {"partial_rotary_factor": 0.5}}


@pytest.mark.parametrize("family", [{}, PARTIAL], ids=["llama", "phi3"])
def test_uniform_heads_of_a_whole_budget_are_the_donor(family: dict[str, Any]) -> None:
    donor, ids = donor_model(heads=4, kv_heads=4, **family), token_ids(2, 20)
    whole = converted(donor, DHASettings(1.0, uniform=True))
    assert type(whole) is type(donor)
    assert relative(logits(whole, ids), logits(donor, ids)) < 2e-5


@pytest.mark.parametrize(
    ("maps", "stock"),
    [
        ([[0, 1, 1, 0], [0, 0, 1, 1]], True),  # not next to each other, another order in each layer
        ([[0, 1, 1, 1], [0, 0, 1, 1]], False),  # groups of two sizes
        ([[0, 1, 2, 3], [0, 0, 1, 1]], False),  # layers of two sizes
    ],
)
def test_a_plan_of_equal_groups_is_written_as_stock(
    recipe: Callable[..., Recipe], tmp_path: Path, maps: list[list[int]], stock: bool
) -> None:
    plan = [{"k_map": heads, "v_map": heads} for heads in [*maps, maps[0]]]
    report = mhconvert.convert(recipe(tmp_path / "out", settings=DHASettings(plan=plan), verify=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"] == ["LlamaForCausalLM"]) is stock
    assert report["verified"]["relative_logit_error"] < 1e-5
    assert report["remote_code"] is not stock
    assert [layer["k_map"] for layer in report["layers"]] == [*maps, maps[0]]


def test_a_uniform_checkpoint_is_known_as_ours(
    recipe: Callable[..., Recipe], text: Path, tmp_path: Path
) -> None:
    """It can be healed and timed like others, and made again from its own plan."""
    out = tmp_path / "out"
    mhconvert.convert(recipe(out, settings=DHASettings(0.5, uniform=True)))
    assert inspection.inspect(str(out))["converted_by"] == "dha"
    settings = HealSettings(
        tokens=512, data={str(text): 1.0}, train="attention", sequence_length=64, batch_tokens=128, lr=1e-3
    )
    report = mhconvert.heal(str(out), settings, output=str(tmp_path / "healed"))
    assert report["kl"] < report["before"]["kl"]
    timed = mhconvert.bench(str(out), contexts=[32], batch=1, new_tokens=2)
    assert timed["rows"][0]["cache_ratio"] == 0.5
    again = recipe(tmp_path / "again", settings=DHASettings(plan=str(out / "mhconvert.json")))
    mhconvert.convert(again)
    assert hashes(tmp_path / "again") == hashes(out)


def test_an_edited_plan_is_another_recipe(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": [{"kv_heads": 4}] * LAYERS}))
    first = recipe(tmp_path / "out", settings=DHASettings(plan=str(plan)))
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(first, on_progress=stop_after(2, KeyboardInterrupt()))
    plan.write_text(json.dumps({"layers": [{"kv_heads": 2}] * LAYERS}))
    with pytest.raises(OutputError, match="another settings"):
        mhconvert.convert(recipe(tmp_path / "out", settings=DHASettings(plan=str(plan))), resume=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "regroup"),
    [(12, 4, None), (12, 4, True), (12, 4, False), (12, 12, None), (6, 3, False), (6, 3, True)],
)
@pytest.mark.parametrize("uniform", [False, True])
def test_many_query_heads_and_both_ways_to_group_them(
    heads: int, kv_heads: int, regroup: bool | None, uniform: bool
) -> None:
    """Beyond nine query heads heads are searched for; a donor's KV heads stay whole where they may not part."""
    donor = donor_model(heads=heads, kv_heads=kv_heads, hidden=96, head_dim=16)
    settings = DHASettings(0.75, regroup=regroup, uniform=uniform)
    method, ids = DHA(donor.config, settings, "quick"), token_ids(4, 32)
    layers = converted_layers(donor, method, ids)
    model = assembled(donor, method, layers)
    assert 1e-3 < relative(logits(model, ids), logits(donor, ids)) < 1.5  # random heads have little in common
    if regroup is False and not uniform:
        for k_map, v_map in zip(model.config.k_head_map, model.config.v_head_map, strict=True):
            for head_map in (k_map, v_map):
                group = heads // kv_heads
                assert all(len(set(head_map[i : i + group])) == 1 for i in range(0, heads, group))
    if kv_heads == heads:
        seen = method.observe(
            donor.model.layers[0].self_attn,
            attention_inputs(donor, ids)[0],
            layer_rotary(donor.model.rotary_emb, donor.config, 0, 32),
        )
        found = [tuple(map(tuple, one)) for one in method._candidates(seen, 0)]
        assert len(set(found)) == len(found)


def test_limits_are_kept(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = DHASettings(0.75, min_heads=2, max_heads=3)
    report = mhconvert.convert(recipe(tmp_path / "out", settings=settings))
    assert heads_of(report) == [6] * LAYERS
    assert all(2 <= layer[f"{kind}_heads"] <= 3 for layer in report["layers"] for kind in "kv")


@pytest.mark.parametrize("uniform", [False, True])
def test_a_donor_whose_config_leaves_the_head_dim_out(
    recipe: Callable[..., Recipe], tmp_path: Path, uniform: bool
) -> None:
    bare = tmp_path / "bare"
    make_donor(bare, family="starcoder2", heads=4, kv_heads=4, layers=LAYERS, sliding_window=None)
    stored = json.loads((bare / "config.json").read_text())
    stored.pop("head_dim", None)
    (bare / "config.json").write_text(json.dumps(stored))
    base = recipe(tmp_path / "out", settings=DHASettings(0.5, uniform=uniform))
    mhconvert.convert(dataclasses.replace(base, model=str(bare)))
    timed = mhconvert.bench(str(tmp_path / "out"), contexts=[32], batch=1, new_tokens=2)
    assert timed["rows"][0]["cache_ratio"] == 0.5


def test_a_curve_has_the_budgets_that_the_donor_can_have(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    found = mhconvert.curve(recipe(tmp_path / "none", effort="quick", fit_steps=None))
    assert [point["kv_budget"] for point in found["points"]] == [0.75, 0.5, 0.375, 0.3125, 0.25]


def test_curves_and_tolerances_of_a_donor_with_normed_keys(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The default budget, a half, is none that it can have; the survey asks for none."""
    donor = make_donor(tmp_path / "normed", family="qwen3", layers=LAYERS, heads=HEADS, kv_heads=HEADS)
    base = recipe(tmp_path / "out", model=str(donor), settings=DHASettings(), effort="quick", fit_steps=None)
    assert [point["kv_budget"] for point in mhconvert.curve(base)["points"]] == [0.75]
    report = mhconvert.convert(dataclasses.replace(base, tolerance="kl=10"))
    assert {layer["k_heads"] for layer in report["layers"]} == {HEADS}
    assert min(layer["v_heads"] for layer in report["layers"]) < HEADS


def test_a_tolerance_is_not_tried_twice_at_the_same_heads(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A uniform donor of four heads has four sizes, whatever the budget."""
    base = recipe(tmp_path / "out", settings=DHASettings(uniform=True), tolerance="kl=1e-3", fit_steps=0)
    report = mhconvert.convert(base)
    tried = [one["kv_budget"] for one in report["tolerance"]["tried"]]
    sizes = [int(4 * budget + 1e-9) for budget in tried]
    assert len(set(sizes)) == len(sizes)


def test_decoupled_heads_are_healed(recipe: Callable[..., Recipe], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mhconvert.convert(recipe(out, settings=DHASettings(0.25), fit_steps=0))
    settings = HealSettings(tokens=2048, data={str(text): 1.0}, sequence_length=64, batch_tokens=128, lr=3e-3)
    report = mhconvert.heal(str(out), settings, output=str(tmp_path / "healed"))
    assert report["kl"] < 0.95 * report["before"]["kl"]
    assert report["verified"]["cache"]["elements_per_token"] == LAYERS * 2 * WIDTH


def test_the_fit_brings_a_layer_closer(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    errors = [
        [
            layer["relative_error"]
            for layer in mhconvert.convert(recipe(tmp_path / str(n), fit_steps=n))["layers"]
        ]
        for n in (0, 40)
    ]
    assert all(after <= before for before, after in zip(*errors, strict=True))
    assert sum(errors[1]) < 0.95 * sum(errors[0])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--kv-budget", "0.1"], 1, "kv_budget=0.1 leaves fewer heads than layers have at least"),
        (["--kv-budget", "0.5", "--plan", "p.json"], 2, "--kv-budget, or the heads of every layer"),
        (["--plan", "p.json"], 1, "plan p.json cannot be read: No such file"),
        (["--profile", "portable"], 2, "--profile does not apply to dha"),
        (["--survey"], 2, "--survey goes with --dry-run"),
        (["--uniform", "--plan", "p.json"], 1, "leave out uniform or the plan"),
    ],
)
def test_wrong_options_say_what_is_right(
    here: Cli,
    donor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = here(donor, "--to", "dha", *options)
    assert found.returncode == code
    assert said in " ".join(found.stderr.replace("│", " ").split())
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_a_plan_that_it_takes(
    here: Cli, donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [
        "--to",
        "dha",
        "--calibration",
        str(text),
        "--calibration-tokens",
        "1024",
        "--sequence-length",
        "64",
    ]
    plan = here(donor, *common, "--kv-budget", "0.5", "--dry-run", "--survey", "--json")
    assert plan.returncode == 0, plan.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "plan.json").write_text(plan.stdout)
    done = here(donor, *common, "--effort", "quick", "--plan", "plan.json", "--json", "-o", "out")
    assert done.returncode == 0, done.stderr
    planned = [layer["kv_heads"] for layer in json.loads(plan.stdout)["layers"]]
    assert heads_of(json.loads(done.stdout)) == planned
    shown = here(donor, *common, "--plan", "plan.json", "--dry-run")
    assert "K and V heads" in shown.stdout
