"""The JSON Schema says what the reader of a recipe says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest
import yaml

from mhconvert.convert.methods.registry import METHOD_NAMES, settings_class
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.eval.settings import EvalSettings
from mhconvert.run import shipped_recipes
from mhconvert.run.json_schema import DRAFT, schema
from mhconvert.run.stage_settings import ExportStage, PushStage
from mhconvert.run.whole_recipe import RunRecipe

PLAIN = {"model": "x", "method": "mla"}


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_it_is_json_with_every_key() -> None:
    found = json.loads(json.dumps(schema()))
    assert found["$schema"] == DRAFT
    assert set(found["properties"]) == {f.name for f in dataclasses.fields(Recipe)} | {
        "eval",
        "export",
        "push",
    }
    for kind in (HealSettings, EvalSettings, ExportStage, PushStage, *map(settings_class, METHOD_NAMES)):
        mapping = found["$defs"][kind.__name__]
        assert set(mapping["properties"]) == {field.name for field in dataclasses.fields(kind)}
        assert not mapping["additionalProperties"]


def test_descriptions_and_bounds_are_the_declarations() -> None:
    properties = schema()["$defs"]["MLASettings"]["properties"]
    assert properties["kv_budget"] == {
        "type": "number",
        "description": "Share of the bytes of the donor's 16-bit KV cache that the latent cache may have; with kv_bits "
        "16 of the donor's KV elements per token.",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 0.5,
    }
    assert properties["kv_bits"]["default"] == "auto"
    assert properties["profile"]["enum"] == ["quality", "portable"]
    assert properties["kv_lora_rank"]["description"].startswith("Width of the latent")
    described = schema()["$defs"]["EvalSettings"]["properties"]
    assert [name for name, known in described.items() if "description" not in known] == []


@pytest.mark.parametrize("name", shipped_recipes.names())
def test_the_recipes_that_ship_are_valid(name: str, validator: Any) -> None:
    validator.validate(yaml.safe_load(shipped_recipes.find(name).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"settings": None},
        {"heal": {"tokens": "20M", "data": ["a.txt"], "loss": "kl=1"}},
        {"heal": {"tokens": 5, "data": {"a.txt": 1}}, "calibration": {"sources": "a.txt"}},
        {"method": "moh", "settings": {"active": [1, 0.5], "shared": 0.5}},
        {"method": "dha", "settings": {"plan": [{"kv_heads": 1}], "regroup": None}},
        {"method": "hydra", "settings": {"targets": ["o_proj"]}, "export": {"to": "lora"}},
        {"eval": {"suite": "quick", "tasks": "piqa", "limit": 3}, "push": {"repo": "a/b"}},
        {"eval": None, "max_shard_size": 10**9},
    ],
)
def test_what_the_reader_takes_is_valid(change: dict[str, Any], validator: Any) -> None:
    validator.validate(PLAIN | change)
    RunRecipe.from_dict(PLAIN | change)


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 0.5},
        {"model": None},
        {"method": "mqa"},
        {"settings": {"active": 0.5}},
        {"method": "moh", "settings": {"kv_budget": 0.5}},
        {"settings": {"profile": "small"}},
        {"effort": "some"},
        {"fit_steps": "many"},
        {"fit_steps": True},
        {"verify": 1},
        {"heal": "20M"},
        {"heal": {"token": 5}},
        {"calibration": {"sources": [5]}},
        {"eval": {"suite": "slow"}},
        {"export": {}},
        {"export": "lora"},
        {"push": {"repo": "a/b", "secret": True}},
    ],
)
def test_what_the_reader_refuses_is_not(change: dict[str, Any], validator: Any) -> None:
    from mhconvert.errors import MhconvertError

    assert not validator.is_valid(PLAIN | change)
    with pytest.raises(MhconvertError):
        RunRecipe.from_dict(PLAIN | change)
