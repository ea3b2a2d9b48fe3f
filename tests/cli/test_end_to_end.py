"""The commands that need no conversion, on tiny random donors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli, Main
from tests.donors import make_donor, make_gguf


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("cli") / "tiny", layers=2, kv_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The river ran slowly past the town, and the boats came home. " * 40, encoding="utf-8")
    return path


def test_a_donor_against_its_gguf_twin(here: Cli, donor: Path, text: Path, tmp_path: Path) -> None:
    twin = make_gguf(tmp_path / "tiny.gguf", layers=2, kv_heads=2)
    done = here(
        "eval", donor, "--against", twin, "--text", text, "--sequence-length", 64, "--sequences", 3, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (found,) = result["texts"]
    first, second = found["models"]
    assert found["tokens"] == 3 * 63
    assert second["kl"] == pytest.approx(0, abs=1e-6)
    assert second["top1_agreement"] == 1
    assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)


def test_generate_is_greedy_and_measures_its_cache(cli: Cli, here: Cli, donor: Path) -> None:
    words = ("generate", donor, "The cache", "--max-new-tokens", 6)
    first, again = here(*words, "--json"), cli(*words)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert result["new_tokens"] <= 6
    assert again.stdout.rstrip("\n") == "The cache" + result["text"].rstrip("\n")
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "{donor}", "--text", "{text}"], "name the donor with --against"),
        (["eval", "{donor}", "--against", "{donor}", "--text", "absent.txt"], "absent.txt cannot be read"),
        (["eval", "{donor}", "--against", "{donor}", "--text", "{text}"], "choose --sequences ≤"),
        (["generate", "{donor}", ""], "the prompt has no tokens"),
        (["generate", "{donor}", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["generate", "{donor}", "x", "--max-new-tokens", "600"], "reads at most 512 tokens"),
        (["generate", "{donor}", "x", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["generate", "smolm2-135m", "x"], "smollm2-135m"),
        (["inspect", "./nowhere"], "nowhere"),
    ],
)
def test_faults(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    donor: Path,
    text: Path,
    words: list[str],
    message: str,
) -> None:
    assert main(*(word.format(donor=donor, text=text) for word in words)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 2  # a line of progress may stand before it
    assert message in captured.err.splitlines()[-1]
