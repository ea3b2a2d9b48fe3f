"""The scripts in `examples/` run as they are, on a tiny random donor."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.donors import TEXT, make_donor

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ("--tokens", "512", "--length", "64")

Script = Callable[..., str]


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("examples") / "donor", head_dim=64, hidden=96)


@pytest.fixture(scope="module")
def text(donor: Path) -> Path:
    path = donor.parent / "text.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script of `examples/` in this process with these words; returns what it printed."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def converted(donor: Path) -> Path:
    """A folder that the first example writes, for those that begin with one."""
    output = donor.parent / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_a_model.py", str(donor), str(output), *SMALL])
        runpy.run_path(str(EXAMPLES / "convert_a_model.py"), run_name="__main__")
    return output


def test_every_example_has_a_test() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))


def test_every_example_is_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(path.name in listed for path in EXAMPLES.glob("*.py"))


def test_convert(converted: Path) -> None:
    assert (converted / "config.json").exists()
    assert (converted / "report.json").exists()


def test_plan_and_curve(script: Script, donor: Path) -> None:
    said = script("plan_and_curve.py", donor, "--budgets", 0.75, 0.5, *SMALL)
    assert "GiB of memory" in said
    assert said.count("KL") == 2


def test_heal(script: Script, converted: Path, text: Path) -> None:
    output = converted.parent / "healed"
    words = (converted, output, "--tokens", 1024, "--data", text, "--length", 64)
    assert "KL" in script("heal_a_checkpoint.py", *words)
    assert (output / "metrics.jsonl").exists()


def test_evaluate(script: Script, converted: Path, text: Path) -> None:
    said = script("evaluate_checkpoints.py", text, converted, "--sequences", 4, "--length", 64)
    assert said.count("perplexity") == 2


def test_export_and_verify(script: Script, donor: Path, tmp_path: Path) -> None:
    words = (donor, tmp_path / "portable", tmp_path / "served", "--kv-budget", 0.6, *SMALL)
    said = script("export_and_verify.py", *words)
    assert "deepseek_v3" in said
    assert "True" in said


def test_hydra_with_peft(script: Script, donor: Path, text: Path, tmp_path: Path) -> None:
    script("hydra_with_peft.py", donor, text, tmp_path / "adapter", "--steps", 2, "--length", 64)
    assert (tmp_path / "adapter-merged" / "config.json").exists()
