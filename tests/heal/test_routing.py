"""Healing of routed heads: real checkpoints come nearer to their donors, the load is recorded and can be balanced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhconvert import api
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import HealError
from mhconvert.heal.metrics import read
from tests.donors import make_donor


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = (f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(300))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def made(donor: Path, text: Path, output: Path, **settings: Any) -> Path:
    api.convert(
        Recipe(
            str(donor),
            "moh",
            settings=MoHSettings(**settings),
            effort="quick",
            verify=False,
            output=str(output),
            calibration=Calibration((str(text),), tokens=4096, sequence_length=128, held_out=2),
        )
    )
    return output


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """The real checkpoint of a name, converted once on a text; only to be read."""
    kept: dict[str, Path] = {}

    def converted(name: str, text: Path) -> Path:
        if name not in kept:
            place = tmp_path_factory.mktemp("real") / "ckpt"
            kept[name] = made(data / "checkpoints" / name, text, place, active=0.5, shared=0.25)
        return kept[name]

    return converted


@pytest.mark.parametrize(
    ("train", "router"), [("attention", "fixed"), ("attention", "trained"), ("lora", "fixed")]
)
@pytest.mark.parametrize(
    ("name", "source", "factor"),
    [("stories260k-gqa", "classic-books.jsonl", 1.35), ("poems750k-mha", "poems.jsonl", 1.5)],
)
def test_a_real_checkpoint_is_healed(
    name: str,
    source: str,
    factor: float,
    train: Any,
    router: Any,
    data: Path,
    real: Callable[[str, Path], Path],
    tmp_path: Path,
) -> None:
    text = data / "calib" / source
    checkpoint = real(name, text)
    settings = HealSettings(
        tokens="18k",
        data={str(text): 1.0},
        train=train,
        lr=3e-3,
        sequence_length=128,
        batch_tokens=512,
        micro_batch=4,
        router=router,
        loss={"kl": 1.0, "balance": 0.01} if router == "trained" else {"kl": 1.0},
    )
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "healed"))
    assert report["before"]["kl"] > factor * report["kl"]
    assert report["verified"]["relative_logit_error"] < 1e-4
    entries = [entry for entry in read(tmp_path / "healed" / "metrics.jsonl") if "head_load" in entry]
    assert len(entries) == report["healing"]["steps"]
    config = api.inspect(str(checkpoint))["attention"]
    active = (
        config["active_heads"] if isinstance(config["active_heads"], list) else [config["active_heads"]] * 5
    )
    routing = [count - config["shared_heads"] for count in active]
    sums = [sum(load) for load in entries[-1]["head_load"]]
    routed = config["num_attention_heads"] - config["shared_heads"]
    assert sums == pytest.approx([count for count in routing if 0 < count < routed], abs=2e-3)
    assert all((entry["balance"] > 0) == (router == "trained") for entry in entries)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "healed"))
    same = {key for key in ours if torch.equal(ours[key], theirs[key])}
    scores = {key for key in ours if ".router.score." in key}
    assert scores
    assert scores & same == (scores if router == "fixed" else set())
    assert not any(key.endswith("q_proj.weight") for key in same)


def test_a_balance_that_counts_makes_the_load_even(tmp_path: Path, text: Path) -> None:
    """With it alone in charge, the busiest head of a layer has less of the tokens than without it."""
    donor = make_donor(tmp_path / "donor", layers=2, heads=8, kv_heads=8, hidden=64, head_dim=8)
    checkpoint = made(donor, text, tmp_path / "ckpt", active=0.25, shared=0.0, uniform=True)
    busiest = []
    for balance in (0.0, 30.0):
        settings = HealSettings(
            tokens=256 * 40,
            data={str(text): 1.0},
            epochs=99,
            train="attention",
            lr=0.03,
            sequence_length=64,
            batch_tokens=256,
            router="trained",
            loss={"kl": 1.0, "balance": balance},
        )
        out = tmp_path / str(balance)
        api.heal(str(checkpoint), settings, output=str(out), verify=False)
        loads = [entry["head_load"] for entry in read(out / "metrics.jsonl") if "head_load" in entry]
        busiest.append(torch.tensor(loads[-8:]).mean(0).amax(-1).mean().item())
    assert busiest[1] < 0.85 * busiest[0]


def test_a_balance_needs_heads_that_are_routed(tmp_path: Path, text: Path) -> None:
    donor = make_donor(tmp_path / "donor")
    api.convert(
        Recipe(
            str(donor),
            "mla",
            MLASettings(kv_bits="16"),
            effort="quick",
            verify=False,
            output=str(tmp_path / "ckpt"),
            calibration=Calibration((str(text),), tokens=512, sequence_length=64, held_out=2),
        )
    )
    with pytest.raises(HealError, match="a fixed router does not learn to balance"):
        HealSettings(tokens=256, loss={"kl": 1.0, "balance": 0.01})
    settings = HealSettings(tokens=256, data={str(text): 1.0}, router="trained")
    with pytest.raises(HealError, match="routes no heads"):
        api.heal(str(tmp_path / "ckpt"), settings, output=str(tmp_path / "out"))
    with pytest.raises(HealError, match="every weight of loss is 0"):
        HealSettings(tokens=256, loss={"balance": 1.0}, router="trained")


def test_layers_one_by_one_and_then_the_gates_learn(tmp_path: Path, text: Path) -> None:
    donor = make_donor(tmp_path / "donor", layers=2, heads=4, kv_heads=2)
    checkpoint = made(donor, text, tmp_path / "ckpt", active=0.75, shared=0.5, uniform=True)
    settings = HealSettings(
        tokens=256 * 8,
        layer_tokens=2048,
        lm_tokens=256 * 3,
        data={str(text): 1.0},
        epochs=99,
        train="attention",
        router="trained",
        loss={"kl": 1.0, "balance": 0.1},
        lr=0.01,
        sequence_length=64,
        batch_tokens=256,
    )
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert report["kl"] < report["before"]["kl"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gates = [tensor.abs().max().item() for key, tensor in stored.items() if ".router.maps." in key]
    assert min(gates) > 1e-3
    balances = [e["balance"] for e in read(tmp_path / "out" / "metrics.jsonl") if "balance" in e]
    assert len(balances) == 8
    assert min(balances) > 0  # also where the text alone teaches
    assert "A token has 6 of 8 heads" in (tmp_path / "out" / "README.md").read_text()
