"""`mhconvert eval` with tasks, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, Interrupted, Main
from tests.donors import make_donor


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    return make_donor(folder / "tiny"), make_donor(folder / "twin", seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text("The river ran slowly past the town, and the boats came home. " * 40, encoding="utf-8")
    return path


def test_everything_in_one_command(
    cli: Cli, here: Cli, pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    donor, twin = pair
    pages = [tmp_path / "report.html", tmp_path / "report.md"]
    words = [
        *("eval", twin, "--against", donor, "--suite", "quick", "--text", text, "--sequence-length", 64),
        *("--sequences", 2, "--retrieval", "--retrieval-depths", "0,.1,.9", "--retrieval-trials", 1),
        *("--device", "cpu", "--report", pages[0], "--report", pages[1]),
    ]
    done = here(*words, "--json", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "tiny: mhconvert_quick" in done.stderr
    result = json.loads(done.stdout)
    assert [row["task"] for row in result["tasks"]] == ["mhconvert_quick"]
    assert result["texts"][0]["models"][1]["kl"] > 0
    assert result["retrieval"]["lengths"] == [256, 512]
    assert result["retrieval"]["left_out"] == [1024, 2048]
    assert result["retrieval"]["depths"] == [0, 0.1, 0.9]
    assert all([len(row) for row in one["recalled"]] == [3, 3] for one in result["retrieval"]["models"])
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert "mhconvert_quick" in content.replace("\\", "")
        assert "river.txt" in content
    again = cli(*words, "--quiet", COLUMNS="160")
    assert again.stderr == ""
    for part in (
        "river.txt: 2 × 64 tokens",
        "lm-eval",
        "mhconvert_quick",
        "retrieval",
        "at 0 %",
        "at 10 %",
        "at 90 %",
        "≈: within two standard errors",
    ):
        assert part in again.stdout, again.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "helaswag"], "lm-eval has no task 'helaswag'; did you mean"),
        (
            ["--tasks", "piqa", "--data", "{empty}"],
            "have no file for piqa (piqa_validation*.jsonl or piqa*.jsonl)",
        ),
        (["--suite", "quick", "--report", "page.pdf"], "page.pdf ends in none of .html, .md"),
        (["--suite", "quick", "--backend", "vllm"], "needs vllm, which is not installed here"),
        ([], "give --text, --tasks, --suite, --retrieval, --generation or --refusals"),
        (["--generation", "--prompts", "{empty}/none.txt"], "none.txt cannot be read: No such file"),
        (["--generation", "--max-new-tokens", "500"], "ask others with --prompts"),
    ],
)
def test_faults(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    pair: tuple[Path, Path],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    if "--backend" in words and __import__("importlib.util").util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    assert main("eval", pair[0], *(word.format(empty=tmp_path) for word in words), "--quiet") == 1
    assert message in capsys.readouterr().err


def test_what_models_write(here: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    donor, twin = pair
    prompts, pages = tmp_path / "mine.txt", [tmp_path / "report.html", tmp_path / "report.md"]
    prompts.write_text("The river\nThe boats\n", encoding="utf-8")
    words = [
        *("eval", twin, "--against", donor, "--generation", "--prompts", prompts, "--max-new-tokens", 8),
        *("--device", "cpu", "--report", pages[0], "--report", pages[1]),
    ]
    done = here(*words, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "tiny: texts, greedy" in done.stderr
    title = "mine.txt's 2 prompts, texts of at most 8 tokens, greedy and sampled at temperature 1, float32"
    assert f"generation: {title}" in done.stdout
    found = json.loads(here(*words, "--json").stdout)["generation"]["models"][1]
    assert f"twin: {found['words']}" in done.stdout
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert title.replace("'", "&#x27;") in content or title in content
        assert f"In its own texts it {found['words']}" in content


def test_the_standard_suite_reads_five_kinds_of_text(
    here: Cli, pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    donor, twin = pair
    words = ["eval", twin, "--against", donor, "--suite", "standard", "--device", "cpu"]
    page = tmp_path / "report.md"
    done = here(*words, "--report", page, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    result = json.loads(here(*words, "--json").stdout)
    kinds = ["encyclopaedia", "textbook", "fiction", "chat", "code"]
    assert [found["text"] for found in result["texts"]] == kinds
    donor_over, twin_over = result["over_texts"]
    assert twin_over["worst"] in kinds
    ratios = [found["models"][1]["ratio"] for found in result["texts"]]
    assert twin_over["worst_ratio"] == pytest.approx(max(ratios))
    assert donor_over["ratio"] == 1
    assert f"× {max(ratios):.3f} ({twin_over['worst']})" in done.stdout
    assert f"at worst {max(ratios):.3f} times on {twin_over['worst']}" in page.read_text(encoding="utf-8")
    more = here(*words, "--text", text, "--sequences", 1, "--sequence-length", 32, "--json")
    with_mine = json.loads(more.stdout)
    assert [found["text"] for found in with_mine["texts"]] == [*kinds, "river.txt"]
    assert with_mine["over_texts"] == result["over_texts"]


def test_a_checkpoint_without_tokenizer(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    donor = make_donor(tmp_path / "mute")
    for file in donor.glob("*token*"):
        file.unlink()
    assert main("eval", donor, "--suite", "quick", "--quiet", "--device", "cpu") == 1
    assert f"the tokenizer in {donor} cannot be loaded" in capsys.readouterr().err


def test_ctrl_c_and_again(here: Cli, interrupted: Interrupted, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny", layers=4, seed=3)
    words = ("eval", donor, "--suite", "quick", "--device", "cpu", "--batch-size", 1)
    code, said = interrupted("measuring", *words)
    assert code == 130
    assert "interrupted; the same command goes on after what is measured" in said
    whole = json.loads(here(*words, "--fresh", "--json").stdout)["tasks"]
    done = here(*words, "--json")
    assert json.loads(done.stdout)["tasks"] == whole


def test_two_processes_under_accelerate_find_what_one_does(here: Cli, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny", seed=5)
    words = ("eval", donor, "--suite", "quick", "--device", "cpu", "--json")
    alone = json.loads(here(*words).stdout)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "mhconvert.cli.main", *map(str, words), "--fresh"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert json.loads(done.stdout)["tasks"] == alone["tasks"]
