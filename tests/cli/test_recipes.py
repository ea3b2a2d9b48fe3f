"""`mhconvert recipes`: the whole program, and what it needs no process of its own for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mhconvert.cli.main import arguments
from mhconvert.run import shipped_recipes
from mhconvert.run.json_schema import schema
from tests.conftest import Main

Words = Callable[..., tuple[int, str, str]]
FAULT = (
    "bad.yaml, line 4: settings has no key 'kv_buget'; did you mean kv_budget or kv_bits? (it has kv_bits, "
    "kv_budget, kv_lora_rank, plan, profile, protect, qk_rope_head_dim)"
)


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe with a misspelt key, in the working directory."""
    monkeypatch.chdir(tmp_path)
    text = "model: smollm2-135m\nmethod: mla\nsettings:\n  kv_buget: 0.5\n"
    Path("bad.yaml").write_text(text, encoding="utf-8")
    return "bad.yaml"


@pytest.fixture
def recipes(main: Main, capsys: pytest.CaptureFixture[str]) -> Words:
    """`mhconvert recipes WORD ...` in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main("recipes", *words)
        return code, *capsys.readouterr()

    return run


def test_validate_names_every_faulty_file(bad: str) -> None:
    command = [
        sys.executable,
        "-m",
        "mhconvert.cli.main",
        "recipes",
        "validate",
        "smollm2-135m-mla",
        bad,
        "nothing",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == (
        "smollm2-135m-mla: valid: convert smollm2-135m with mla (kv_budget=0.3125, kv_bits=16), evaluate quick\n"
    )
    assert done.stderr.splitlines() == [
        f"mhconvert: {FAULT}",
        "mhconvert: there is no recipe 'nothing', neither a file nor one that ships; 'mhconvert recipes list' names "
        "those that ship",
    ]


def test_validate_as_json(bad: str, recipes: Words) -> None:
    code, out, _err = recipes("validate", "smollm2-135m-hydra", bad, "--json")
    assert code == 1
    assert json.loads(out) == {
        "recipes": [
            {
                "file": "smollm2-135m-hydra",
                "valid": True,
                "stages": ["convert", "eval", "export"],
                "does": "convert smollm2-135m with hydra, evaluate quick, export to lora",
            },
            {"file": "bad.yaml", "valid": False, "error": FAULT},
        ]
    }


def test_validate_with_overrides(recipes: Words) -> None:
    code, out, _err = recipes("validate", "llama3-8b-mla", "--set", "heal.tokens=1B", "--set", "eval=null")
    assert code == 0
    assert out == (
        "llama3-8b-mla: valid: convert llama3-8b with mla (kv_budget=0.28125, kv_bits=16), heal on 1,000,000,000 "
        "tokens\n"
    )


def test_list(recipes: Words) -> None:
    found = json.loads(recipes("list", "--json")[1])["recipes"]
    assert [entry["name"] for entry in found] == shipped_recipes.names()
    assert set(found[0]) == {"name", "about", "model", "method", "settings", "stages"}
    lines = recipes("list")[1].splitlines()
    assert lines[0].split() == ["recipe", "model", "method", "settings", "stages"]
    wanted = "smollm2-135m-swa smollm2-135m swa kv_budget 0.5625 convert, eval"
    assert " ".join(lines[-1].split()) == wanted


def test_show(recipes: Words) -> None:
    code, out, err = recipes("show", "smollm2-135m-dha")
    assert out == shipped_recipes.find("smollm2-135m-dha").read_text(encoding="utf-8")
    assert json.loads(recipes("show", "smollm2-135m-dha", "--json")[1])["recipe"]["method"] == "dha"
    code, out, err = recipes("show", "smollm-dha")
    assert code == 1
    assert err.startswith("mhconvert: there is no recipe 'smollm-dha', neither a file nor one that ships; ")


def test_schema(recipes: Words, tmp_path: Path) -> None:
    assert json.loads(recipes("schema")[1]) == schema()
    code, out, err = recipes("schema", "-o", str(tmp_path / "schema.json"))
    assert out == f"{tmp_path / 'schema.json'}\n"
    assert json.loads((tmp_path / "schema.json").read_text(encoding="utf-8")) == schema()
    code, out, err = recipes("schema", "-o", str(tmp_path))
    assert code == 1
    assert err == f"mhconvert: {tmp_path} cannot be written: Is a directory\n"


def test_recipes_is_no_donor() -> None:
    assert arguments(["recipes", "list"]) == ["recipes", "list"]
