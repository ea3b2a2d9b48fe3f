"""The steps of a chain: how they are named and read, and what is refused before there is a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.convert.recipe.steps import Step, methods_of
from mhconvert.errors import MhconvertError, RecipeError, UnsupportedError
from mhconvert.run.json_schema import schema
from mhconvert.run.whole_recipe import RunRecipe, load

CHAIN = """\
model: x
methods:
- method: dha
  settings: {kv_budget: 0.75}
- method: moh
- method: hydra
  settings: {r_par: 4}
export: {to: llama}
"""
STEPS = (Step("dha", DHASettings(0.75)), Step("moh", MoHSettings()), Step("hydra", HydraSettings(4)))


@pytest.mark.parametrize(
    ("chain", "methods"),
    [
        ("mla+swa", ("mla+swa",)),
        ("swa+mla+moh", ("swa", "mla", "moh")),
        ("mla+swa+hydra", ("mla+swa", "hydra")),
        ("dha+moo", ("dha", "moo")),
        ("dha+", ("dha", "")),
    ],
)
def test_the_longest_names_are_taken(chain: str, methods: tuple[str, ...]) -> None:
    assert methods_of(chain) == methods


def test_the_parts_of_a_chain() -> None:
    recipe = Recipe("x", methods=STEPS)
    assert (recipe.method, recipe.settings) == ("moh", MoHSettings())
    assert (recipe.passes, recipe.adapter) == (STEPS[:2], STEPS[2])
    assert recipe.part(1) == Recipe("x", "dha", settings=DHASettings(0.75))
    assert recipe.part(2) == Recipe("x", methods=STEPS[:2])
    assert recipe.output_folder("x") == Path("x-dha-moh")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert {"method", "settings"}.isdisjoint(recipe.to_dict())
    assert "methods" not in Recipe("x", "mla").to_dict()


def test_a_file_with_methods(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(CHAIN, encoding="utf-8")
    with pytest.raises(RecipeError, match="line 8: export.to"):  # what the last pass makes has no form
        load(file)
    recipe = load(file, ["export=null", "methods.2.settings.r_par=2"])
    assert recipe.convert.methods == (*STEPS[:2], Step("hydra", HydraSettings(2)))
    assert recipe.stages == ("convert", "adapter")
    assert recipe.summary() == (
        "convert x with dha (kv_budget=0.75), then moh, put beside it hydra (r_par=2)"
    )
    plain = recipe.to_dict()
    assert RunRecipe.from_dict(plain) == recipe
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(plain)
    for wrong in ({"method": "mla"}, {"methods": [{"method": "moo"}, {"method": "moh"}]}, {"methods": []}):
        assert not validator.is_valid(plain | wrong)
    with pytest.raises(RecipeError, match="--set methods.3.settings.r_par=2: methods is not a mapping"):
        load(file, ["methods.3.settings.r_par=2"])


@pytest.mark.parametrize(
    ("methods", "bits"),
    [
        (("mla", "moh"), "16"),
        (("swa", "mla", "moh", "hydra"), "16"),
        (("mla", "hydra"), "auto"),  # an adapter goes on codes
        (("swa", "mla"), "auto"),
    ],
)
def test_latents_have_elements_where_a_later_step_takes_no_codes(methods: tuple[str, ...], bits: str) -> None:
    settings = {"swa": SWASettings(sinks="none"), "mla": MLASettings(kv_budget=0.75)}
    recipe = Recipe("x", methods=[Step(name, settings.get(name)) for name in methods])
    chosen = recipe.methods[methods.index("mla")].settings
    assert chosen == MLASettings(kv_budget=0.75, kv_bits=bits)
    assert RunRecipe.from_dict(recipe.to_dict()).convert == recipe


def test_a_plan_of_codes_is_no_open_choice() -> None:
    coded = MLASettings(plan=[{"components_by_bits": {"8": 4}}])
    with pytest.raises(UnsupportedError, match=r"moh cannot follow mla \(coded\)"):
        Recipe("x", methods=[Step("mla", coded), Step("moh")])


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("dha", "line 2: methods is not a list of steps such as"),
        ("[{method: dha}]", "line 2: methods has one step; give it as method and settings"),
        ("[{method: dha}, {method: moo}]", "line 2: methods.1: unknown method 'moo'; choose one of mla"),
        ("[{method: dha}, {}]", "line 2: methods.1: the method is missing; choose one of mla"),
        ("[{method: dha}, 7]", "line 2: methods.1: 7 is not a mapping of settings"),
        ("[{method: dha, settings: {active: 1}}, {method: moh}]", "methods.0.settings has no key 'active'"),
        ("[{method: moh}, {method: dha}]", "dha cannot follow moh: .*; take the other order, moh last"),
        ("[{method: mla}, {method: dha}]", r"dha cannot follow mla \(coded\): both rewrite keys and values"),
        (
            "[{method: mla, settings: {kv_bits: 4}}, {method: moh}]",
            "take latents of 16-bit elements: --to mla --kv-bits 16",
        ),
        ("[{method: hydra}, {method: dha}]", "an adapter lies beside a model and comes last"),
        (
            "[{method: dha}, {method: moh}]\ntolerance: kl=0.1",
            "line 3: a tolerance decides the budget of one",
        ),
        ("[{method: dha}, {method: moh}]\nmethod: moh", "line 3: method and methods exclude each other"),
    ],
)
def test_faults_are_named_with_their_line(methods: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: x\nmethods: {methods}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        load(file)


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema.Draft202012Validator(schema())


TWO = [{"method": "dha"}, {"method": "moh"}]


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"method": "moh", "methods": None}, True),
        ({"method": None, "settings": None, "methods": TWO}, True),
        ({"method": "moh", "settings": {"active": 0.5}, "methods": None}, True),
        ({"method": None}, False),
        ({"methods": None}, False),
        ({"method": "moh", "methods": TWO}, False),
        ({"settings": {}, "methods": TWO}, False),
        ({"method": "moh", "settings": {"activ": 0.5}, "methods": None}, False),
        ({"methods": [{"method": None}, {"method": "moh"}]}, False),
    ],
)
def test_schema_and_loader_take_the_same(values: dict[str, Any], valid: bool, validator: Any) -> None:
    whole = {"model": "x"} | values
    assert validator.is_valid(whole) == valid
    with nullcontext() if valid else pytest.raises(RecipeError):
        RunRecipe.from_dict(whole)


def test_no_methods_are_one_conversion(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: x\nmethod: moh\nmethods: null\n", encoding="utf-8")
    assert load(file).convert == Recipe("x", "moh")
    file.write_text("model: x\nmethods: [{method: dha}, {method: moh}]\n", encoding="utf-8")
    assert load(file, ["methods=null", "method=moh"]).convert == Recipe("x", "moh")


@pytest.mark.parametrize(
    ("given", "fault", "words"),
    [
        ({"method": "mla"}, MhconvertError, "methods says what is done; leave out method"),
        ({"settings": MoHSettings(0.5)}, MhconvertError, "methods says what is done; leave out method"),
        ({"methods": STEPS[1::-1]}, UnsupportedError, "methods moh and then dha: dha cannot follow moh"),
    ],
)
def test_what_python_is_told(given: dict[str, Any], fault: type[Exception], words: str) -> None:
    with pytest.raises(fault, match=words):
        Recipe(**{"model": "x", "methods": STEPS[:2]} | given)


def test_a_chain_as_a_method_is_told_where_it_goes() -> None:
    with pytest.raises(
        MhconvertError, match=r"unknown method 'dha\+moh'; methods: has the steps dha and moh"
    ):
        Recipe("x", "dha+moh")
