"""`mhconvert curve` and `--tolerance`: words to library calls, results to the table, refusals to exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert import api
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from tests.conftest import Main
from tests.donors import make_donor
from tests.eval.report.test_curve_plot import CURVE

RESULT = CURVE | {
    "kv_bytes_per_token": 46080,
    "same_size": [{"kv_budget": 0.9, "as": 0.3125}],
    "points": [
        {
            "kv_budget": 0.3125,
            "kv_share": 0.3125,
            "kv_bytes_per_token": 14400,
            "kl": 0.8118,
            "perplexity": {"donor": 18.56, "converted": 40.43},
            "perplexity_ratio": 2.178,
            "top1_agreement": 0.568,
            "mean_relative_error": 0.2016,
            "seconds": 32.6,
        }
    ],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, list[float], dict[str, Any]]]:
    seen: list[tuple[Recipe, list[float], dict[str, Any]]] = []

    def curve(recipe: Recipe, budgets: list[float], **options: Any) -> dict[str, Any]:
        seen.append((recipe, budgets, options))
        return RESULT

    monkeypatch.setattr(api, "curve", curve)
    return seen


def test_defaults(main: Main, calls: list) -> None:
    assert main("curve", "tiny", "--to", "mla") == 0
    recipe, budgets, options = calls[0]
    assert recipe == Recipe("tiny", "mla")
    assert budgets is None  # those that the donor can have
    assert (options["text"], options["sequences"], options["baselines"]) == (None, 16, [])


def test_every_option_reaches_the_call(main: Main, calls: list, tmp_path: Path) -> None:
    words = (
        "curve tiny --to mla --budgets 0.5,0.25 --profile portable --effort quick --fit-steps 3 --calibration a.txt"
        " --calibration-tokens 99 --sequence-length 64 --seed 5 --dtype bfloat16 --device cpu --trust-remote-code"
        " --text own.txt --sequences 3 --baselines --kv-cache-dtype fp8"
    )
    assert main(*words.split()) == 0
    recipe, budgets, options = calls[0]
    assert recipe == Recipe(
        "tiny",
        "mla",
        settings=MLASettings(profile="portable"),
        calibration=Calibration(("a.txt",), 99, 64),
        effort="quick",
        fit_steps=3,
        seed=5,
        dtype="bfloat16",
        device="cpu",
        trust_remote_code=True,
    )
    assert budgets == [0.5, 0.25]
    assert (options["text"], options["sequences"]) == (Path("own.txt"), 3)
    assert options["baselines"] == ["int8", "int4", "int3", "int2", "fp8"]


def test_the_table_and_the_files(
    main: Main, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "curve.svg", tmp_path / "curve.json"]
    assert main("curve", "tiny", "--to", "mla", "-o", files[0], "-o", files[1]) == 0
    out = capsys.readouterr().out
    for text in ("31.2 %", "14.06 KiB", "40.43", "× 2.178", "0.8118", "56.8 %", "2,044 predictions", "18.56"):
        assert text in out
    assert "a budget of 90 % comes to the size of 31.2 %, and is not another point" in out
    assert json.loads(files[1].read_text(encoding="utf-8"))["points"] == RESULT["points"]
    assert files[0].read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert main("curve", "tiny", "--to", "mla", "-o", files[0], "--json") == 1
    assert "exists" in json.loads(capsys.readouterr().out)["error"]
    assert len(calls) == 1  # refused before the work
    assert main("curve", "tiny", "--to", "mla", "-o", files[0], "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(files[0])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("curve tiny --to mla --budgets 0.5,much", "'0.5,much' is no list of shares such as 0.75,0.5,0.25"),
        ("curve tiny --to mla --budgets ,", "is no list of shares"),
        ("curve tiny --to mla --kv-cache-dtype int5", "is not one of auto, int8, int4, int3, int2, fp8"),
        ("curve tiny", "--to"),
        ("curve tiny --to mla --kv-budget 0.5", "--kv-budget"),
        ("tiny --to mla --tolerance fine", "none of kl=NATS, ppl=RATIO and generation=NATS"),
        ("tiny --to mla --tolerance kl=1 --kv-budget 0.5", "give --tolerance, or a budget or sizes"),
        ("tiny --to mla --tolerance kl=1 --kv-lora-rank 8 --qk-rope-head-dim 8", "give --tolerance"),
    ],
)
def test_wrong_usage(
    main: Main, calls: list, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(*words.split()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert calls == []


@pytest.mark.parametrize(("tolerance", "message"), [("kl=0", "above 0"), ("ppl=0.99", "above 1")])
def test_a_tolerance_out_of_reach(
    main: Main, capsys: pytest.CaptureFixture[str], tolerance: str, message: str
) -> None:
    assert main("tiny", "--to", "mla", "--tolerance", tolerance) == 1
    assert f"tolerance '{tolerance}' is out of reach: " in (said := capsys.readouterr().err)
    assert f"must be a number {message}" in said


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny donor and what a conversion of it needs, without a subcommand."""
    folder = tmp_path_factory.mktemp("tolerance")
    donor = make_donor(folder / "tiny", layers=2, kv_heads=2)
    text = folder / "text.txt"
    text.write_text("".join(f"{n} boats came home; {n * n} were counted.\n" for n in range(300)))
    options = "--calibration-tokens 512 --sequence-length 64 --device cpu --effort quick"
    return [str(donor), "--to", "mla", "--kv-bits", "16", "--calibration", str(text), *options.split()]


def test_a_tolerance_from_words_to_a_folder(
    main: Main, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(*words, "--tolerance", "kl=0.05", "-o", out, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "the smallest within kl=0.05; it will be searched" in said
    assert "at most" in said
    assert main(*words, "--tolerance", "kl=0.05", "-o", out, "--no-verify") == 0
    captured = capsys.readouterr()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["kl"] <= 0.05
    assert "tolerance kl ≤ 0.05" in captured.out
    assert "looking for the budget 2/2 · closed forms at 8 budgets" in captured.err
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| tolerance kl ≤ 0.05 |" in card
    assert main("curve", *words, "--budgets", report["tolerance"]["kv_budget"], "--json", "--quiet") == 0
    [point] = json.loads(capsys.readouterr().out)["points"]
    assert point["kl"] == report["kl"]


def test_a_budget_out_of_range_is_one_line(
    main: Main, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("curve", *words, "--budgets", "0.5,1.5", "--quiet") == 1
    assert capsys.readouterr().err == (
        "mhconvert: kv_budget=1.5 is outside (0, 1]; it is a share of the donor's KV cache\n"
    )
