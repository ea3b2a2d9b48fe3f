"""A method is a folder and one line: what the registry knows, and a method from elsewhere that goes all the way."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert import EvalSettings, api
from mhconvert.convert.methods import registry
from mhconvert.convert.methods.refusals import CHECKS, refusals
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import BudgetError, MhconvertError, UnsupportedError
from tests.convert.conversions import logits, token_ids
from tests.convert.methods.toy.info import INFO
from tests.convert.methods.toy.settings import GQASettings
from tests.convert.methods.toy.surgery import mean_pooled
from tests.donors import make_config

FOLDER = Path(registry.__file__).parent


@pytest.fixture
def toy() -> Iterator[None]:
    """The method of the folder `toy`, known while a test runs."""
    registry.add(INFO)
    yield
    registry.remove(INFO.name)


def test_the_registry_and_the_infos_import_no_torch() -> None:
    words = "torch transformers peft numpy"
    code = "import sys, mhconvert.convert.methods.registry as r; [r.settings_class(name) for name in r.METHOD_NAMES]; "
    code += f"print([name for name in '{words}'.split() if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_every_folder_with_an_info_is_registered() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/info.py")} == set(registry.FOLDERS)
    for name, folder in zip(registry.METHOD_NAMES, registry.FOLDERS, strict=True):
        # `hybrid_mla` also names the method that it is built on
        assert f"{folder}_".startswith(name.replace("+", "_") + "_")
    assert {*registry.METHODS, *registry.ADAPTERS} == set(registry.METHOD_NAMES)
    assert set(registry.CACHE_METHODS) <= set(registry.METHODS)


@pytest.mark.parametrize("name", registry.METHOD_NAMES)
def test_an_info_names_what_there_is(name: str) -> None:
    info = registry.info(name)
    assert set(info.checks) <= set(CHECKS)
    assert registry.settings_class(name).__name__.lower() == f"{name.replace('+', '')}settings"
    for form in info.forms:
        assert callable(importlib.import_module(form.writer).export_checkpoint)
        assert registry.forms()[form.name] == (info, form)
    assert not info.forms or info.exported_from


def test_unknown_and_doubled_names_are_refused() -> None:
    with pytest.raises(
        UnsupportedError,
        match="method 'gqa' is unknown; choose one of mla, dha, moh, swa, mla\\+swa, hybrid, hydra",
    ):
        registry.info("gqa")
    with pytest.raises(
        MhconvertError, match="there is a method 'mla' already, in mhconvert.convert.methods.mla"
    ):
        registry.add(registry.MethodInfo("mla", "elsewhere", "MLA", "", "layers", "mla"))


def test_mean_pooling_averages_neighbouring_heads() -> None:
    weight = torch.arange(8.0).view(8, 1)  # four heads of two rows
    assert mean_pooled(weight, 2, 2).flatten().tolist() == [1, 2, 5, 6]
    assert mean_pooled(weight[:, 0], 4, 2).tolist() == weight.flatten().tolist()


@pytest.mark.usefixtures("toy")
def test_a_registered_method_converts_reports_and_evaluates(
    donor: Path, text: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = recipe(out, method="gqa", settings=GQASettings(0.5), verify=True)
    plan = api.plan(chosen)
    assert [layer["num_key_value_heads"] for layer in plan["layers"]] == [1] * 5
    report = api.convert(chosen)
    cache = report["kv_bytes_per_token"]
    assert cache["converted"] * 2 == cache["donor"]
    assert plan["kv_bytes_per_token"] == cache
    assert report["parameters"] == plan["parameters"]
    assert report == json.loads((out / "report.json").read_text()) | {"output": report["output"]}
    card = (out / "README.md").read_text()
    assert "its attention rewritten as GQA by mhconvert" in card
    assert "- grouped-query-attention" in card
    assert not list(out.glob("*.py"))
    found = api.evaluate(
        str(out),
        EvalSettings(text=(str(text),), sequences=2, sequence_length=64),
        against=str(donor),
        device="cpu",
    )
    assert [model["method"] for model in found["models"]] == [None, "gqa"]
    with pytest.raises(MhconvertError, match="is of its donor's own class already"):
        mhconvert.export(str(out), "auto")


@pytest.mark.usefixtures("toy")
def test_with_all_heads_it_is_its_donor(donor: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    api.convert(recipe(tmp_path / "out", method="gqa", settings=GQASettings(1.0), fit_steps=0))
    ids = token_ids(2, 32)
    own, converted = (AutoModelForCausalLM.from_pretrained(path) for path in (donor, tmp_path / "out"))
    assert torch.equal(logits(converted, ids), logits(own, ids))


@pytest.mark.usefixtures("toy")
def test_its_refusals_and_the_command_line(donor: Path, tmp_path: Path) -> None:
    assert refusals(make_config())["gqa"] is None
    assert "turns neighbouring elements" in (refusals(make_config(family="cohere"))["gqa"] or "")
    with pytest.raises(BudgetError, match="leaves none of the donor's 2 KV heads"):
        registry.build_method("gqa", make_config(), GQASettings(0.4), "quick")
    assert api.inspect(str(donor))["methods"]["gqa"]["applies"]
    # The command line makes its options when it is imported: the method has to be known before.
    code = "from mhconvert.convert.methods import registry\nfrom tests.convert.methods.toy.info import INFO\n"
    code += "registry.add(INFO)\nfrom mhconvert.cli.main import main\nmain()"
    words = [donor, "--to", "gqa", "--kv-budget", 0.5, "--dry-run", "--json", "-o", tmp_path / "out"]
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["layers"][0]["num_key_value_heads"] == 1
