"""Mixtures of heads through the whole pass and the command line: what is written, measured, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe
from mhconvert.errors import MhconvertError
from mhconvert.eval import inspection
from tests.conftest import Main
from tests.convert.conversions import logits, relative, token_ids
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_donor

LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("moh") / "tiny", layers=LAYERS, heads=HEADS, kv_heads=2)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, **changes: Any) -> Recipe:
        options = {
            "settings": MoHSettings(0.6, 0.25),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 3,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(str(donor), "moh", output=str(output), **(options | changes))

    return build


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_a_whole_folder_that_a_bare_process_reads(
    recipe: Callable[..., Recipe], tmp_path: Path, router: str
) -> None:
    """Check 11: saved, loaded without mhconvert, the same logits; and the cache is the donor's."""
    settings = MoHSettings(0.6, 0.25, router=router)  # type: ignore[arg-type]
    report = mhconvert.convert(recipe(tmp_path / "out", verify=True, settings=settings))
    heads = [layer["active_heads"] for layer in report["layers"]]
    assert sum(heads) == 7  # of 12, 7.2
    assert report["active_heads"] == {"donor": 12, "converted": 7}
    assert report["verified"]["module"] == "transformers_modules"
    assert report["verified"]["relative_logit_error"] < 1e-5
    assert report["kv_bytes_per_token"]["converted"] == report["kv_bytes_per_token"]["donor"]
    flops = report["attention_flops"]
    assert flops["converted"] < flops["donor"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rewritten as MoH by" in card
    assert "active heads a token" in card
    assert "58.3 % of the donor's" in card
    facts = inspection.inspect(str(tmp_path / "out"))
    assert facts["converted_by"] == "moh"
    assert facts["attention"]["active_heads"] == heads
    assert facts["attention"]["shared_heads"] == 1
    kept = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert kept.settings == settings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["shared_heads"] == [layer["shared_heads"] for layer in report["layers"]]
    assert (config["norm_scale"] is not None) == (router == "norm")


def test_norms_alone_leave_every_byte_of_the_weights(
    recipe: Callable[..., Recipe], donor: Path, tmp_path: Path
) -> None:
    settings = MoHSettings(0.75, 0.5, router="norm", shared_heads="first")
    mhconvert.convert(recipe(tmp_path / "out", settings=settings, fit_steps=0))
    written, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", donor))
    assert written.keys() == stored.keys()
    assert all(written[name].numpy().tobytes() == stored[name].numpy().tobytes() for name in stored)


def test_all_heads_are_the_donor_and_divergence_falls_towards_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    found = [
        mhconvert.convert(recipe(tmp_path / str(share), settings=MoHSettings(share, 0.25), fit_steps=0))["kl"]
        for share in (0.4, 0.6, 0.8, 1.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1e-3
    assert found[-1] == 0.0


def test_a_fit_brings_the_layers_nearer(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = MoHSettings(0.5, 0.25, uniform=True)
    errors = [
        sum(
            layer["relative_error"]
            for layer in mhconvert.convert(recipe(tmp_path / str(steps), settings=settings, fit_steps=steps))[
                "layers"
            ]
        )
        for steps in (0, 60)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_fit_of_layers_leaves_every_gate_at_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Attention alone, and whole blocks on the student's stream; scores keep what the closed form gave them."""
    settings = MoHSettings(0.75, 0.5, uniform=True)
    scores = []
    for name, choices in {"quick": {"fit_steps": 0}, "fit": {}, "high": {"effort": "high"}}.items():
        mhconvert.convert(recipe(tmp_path / name, settings=settings, **choices))
        stored = load_file(tmp_path / name / "model.safetensors")
        assert all(not tensor.any() for key, tensor in stored.items() if ".router.maps." in key)
        scores.append(stored["model.layers.0.self_attn.router.score.weight"])
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-4, atol=1e-5)


def test_resume_gives_the_same_bytes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mhconvert.convert(recipe(tmp_path / "whole"))
    cut = recipe(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(2, KeyboardInterrupt()))
    mhconvert.convert(cut, resume=True)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("cut", "whole")]
    assert configs[0] == configs[1]


def test_a_tolerance_needs_a_cache_to_shrink(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(MhconvertError, match="decides a KV budget, which moh does not have"):
        recipe(tmp_path / "out", tolerance="kl=0.1")


@pytest.mark.parametrize(
    ("name", "source", "factor"),
    [("stories260k-gqa", "classic-books.jsonl", 1.2), ("poems750k-mha", "poems.jsonl", 1.08)],
)
def test_routing_beats_the_same_number_of_fixed_heads_on_real_text(
    name: str, source: str, factor: float, data: Path, tmp_path: Path
) -> None:
    """Divergence on rows that nothing has seen, closed forms; and the opposite choice is worse than either."""
    found = {}
    for kind, settings in {
        "routed": MoHSettings(0.75, 0.5, uniform=True),
        "fixed": MoHSettings(0.75, 0.75, uniform=True),
        "paper": MoHSettings(0.75, 0.5, router="norm", shared_heads="first"),
    }.items():
        recipe = Recipe(
            str(data / "checkpoints" / name),
            "moh",
            settings=settings,
            effort="quick",
            verify=False,
            output=str(tmp_path / kind),
            calibration=Calibration((str(data / "calib" / source),), tokens=8192, sequence_length=128),
        )
        found[kind] = mhconvert.convert(recipe)["kl"]
    assert found["fixed"] > factor * found["routed"]
    assert found["paper"] > factor * found["routed"]


def test_the_command_line(main: Main, donor: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = [
        donor,
        "--to",
        "moh",
        "--calibration",
        text,
        "--calibration-tokens",
        1024,
        "--sequence-length",
        64,
    ]
    options = ["--active", "3,2,0.75", "--shared", "1,0,2", "--route", "heads", "--effort", "quick"]
    assert main(*words, *options, "-o", out, "--json", "--device", "cpu", "--no-verify") == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["active_heads"] for layer in report["layers"]] == [3, 2, 3]
    assert [len(layer["shared_heads"]) for layer in report["layers"]] == [1, 0, 2]
    assert main(*words, "--active", 0.5, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "active heads a token" in said
    assert "6 of 12" in said


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--active", "some"], 2, "'some' is neither a share of heads nor a list"),
        (["--active", "1.5"], 1, "active=1.5 is not a share"),
        (["--active", "3,3"], 1, "active has 2 entries and the donor 3 layers"),
        (["--active", "3,9,3"], 1, "active, layer 1: 9 heads, and the donor has 4 in a layer"),
        (["--kv-budget", "0.5"], 2, "--kv-budget does not apply to moh"),
        (["--router", "random"], 2, "'random' is not one of"),
        (["--active", "0.2"], 1, "choose a smaller shared, or active ≥ 0.25"),
    ],
)
def test_bad_numbers_are_named(
    main: Main, donor: Path, capsys: Any, options: list[str], code: int, words: str
) -> None:
    assert main(donor, "--to", "moh", "--dry-run", *options) == code
    assert words in " ".join(capsys.readouterr().err.split()).replace("│ ", "")


def test_routing_options_are_of_moh_alone(main: Main, donor: Path, capsys: Any) -> None:
    assert main(donor, "--to", "mla", "--dry-run", "--active", "0.5") == 2
    assert "--active does not apply to mla" in capsys.readouterr().err
    assert main("curve", donor, "--to", "moh") == 2
    assert "'moh' is not a method that changes the KV cache" in " ".join(capsys.readouterr().err.split())


def test_a_written_folder_goes_on_in_transformers(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Loaded, cast to bfloat16, saved again and loaded: the same choices, nearly the same logits."""
    from mhconvert.convert.methods.moh import register

    register()
    mhconvert.convert(recipe(tmp_path / "out"))
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), token_ids(2, 20)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(logits(again, ids), logits(half, ids))
    assert relative(logits(half, ids).float(), logits(model, ids)) < 0.1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {"score.weight", "score.bias", "maps.stage.weight"} <= {
        name.split(".router.")[1] for name in stored if ".router." in name
    }
