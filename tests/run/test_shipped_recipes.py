"""The recipes that ship: how they are named, and that they are what their names say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mhconvert.convert.donor.aliases import ALIASES
from mhconvert.convert.methods.registry import METHOD_NAMES, settings_class
from mhconvert.errors import RecipeError
from mhconvert.run import shipped_recipes
from mhconvert.run.whole_recipe import load

EVERY_METHOD = ("llama3-8b", "llama3.1-8b", "smollm2-135m")
SHIPPED = sorted(
    [
        f"{model}-{method}"
        for model in EVERY_METHOD
        for method in METHOD_NAMES
        if "swa" not in method and method != "hybrid"
    ]
    + [
        "llama3.1-8b-mla-coded",
        "llama3.1-8b-mla-portable",
        "qwen2.5-7b-mla",
        "qwen2.5-7b-mla-coded",
        "qwen3-8b-mla-coded",
        "mistral-7b-mla",
        "mistral-7b-mla-coded",
        "smollm2-135m-mla-healed",
        "smollm2-135m-dha-moh",
        "smollm2-135m-swa",
        "smollm2-135m-mla-swa",
        "smollm2-135m-hybrid",
    ]
)
EXAMPLE = "#   mhconvert run "


def test_names() -> None:
    assert shipped_recipes.names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_what_its_name_says(name: str) -> None:
    found = shipped_recipes.entry(shipped_recipes.find(name))
    plain = f"{found.model}-{found.method.replace('+', '-')}"
    variant = name.removeprefix(plain).removeprefix("-")
    assert name in (plain, f"{plain}-{variant}")
    assert found.model in ALIASES
    recipe = load(shipped_recipes.find(name))
    for step in recipe.convert.methods or recipe.convert.passes:
        prefix = f"{step.method}." if recipe.convert.methods else ""
        written = {
            name.removeprefix(prefix): value
            for name, value in found.settings.items()
            if name.startswith(prefix)
        }
        assert settings_class(step.method)(**written) == step.settings
    if found.method == "mla":  # their figures and costs are those of elements with 16 bits
        assert found.settings["kv_bits"] == ("auto" if variant == "coded" else 16)
        assert (found.settings.get("profile") == "portable") == (variant == "portable")
    assert ("heal" in found.stages) >= (variant == "healed")
    assert found.stages == recipe.stages


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_says_what_it_makes_and_costs(name: str) -> None:
    path = shipped_recipes.find(name)
    text = path.read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert shipped_recipes.entry(path).about == comment[0].removeprefix("# ")
    assert comment[1] == f"{EXAMPLE}{name}"
    assert any(line.startswith("# Expected cost") for line in comment)
    assert "(arXiv 2" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", SHIPPED)
def test_the_commands_in_a_recipe_are_recipes_too(name: str) -> None:
    path = shipped_recipes.find(name)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(EXAMPLE):
            command = line.removeprefix(EXAMPLE).partition("    ")[0].replace("USER/", "user/").split()
            assert command[0] == name
            assert load(path, [word for word in command[1:] if word != "--set"]).convert.model


def test_what_a_recipe_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-mla").mkdir()  # what an earlier run has made is no recipe
    shipped = shipped_recipes.find("smollm2-135m-mla")
    assert shipped.name == "smollm2-135m-mla.yaml"
    for word in ("smollm2-135m-mla.yaml", "recipes/smollm2-135m-mla", "recipes/smollm2-135m-mla.yaml"):
        assert shipped_recipes.find(word) == shipped
    (tmp_path / "smollm2-135m-mla.yaml").write_text("model: x\n", encoding="utf-8")
    assert shipped_recipes.find("smollm2-135m-mla.yaml") == Path("smollm2-135m-mla.yaml")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("qwen2.5-7b-mal", "did you mean qwen2.5-7b-mla"),
        ("mistral", "did you mean mistral-7b-mla?"),
        ("recipes/nothing.yaml", "'mhconvert recipes list' names those that ship"),
    ],
)
def test_a_recipe_that_there_is_not(word: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        shipped_recipes.find(word)
    expected = f"there is no recipe '{word}', neither a file nor one that ships; {hint}"
    assert str(caught.value).startswith(expected)


def test_no_model_library_is_needed() -> None:
    code = (
        "import sys\nfrom mhconvert.run import json_schema, shipped_recipes\n"
        "from mhconvert.run.whole_recipe import load\n"
        "[load(shipped_recipes.find(name), ['push.repo=a/b']) for name in shipped_recipes.names()]\n"
        "json_schema.schema()\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
