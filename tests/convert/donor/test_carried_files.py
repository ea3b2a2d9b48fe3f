"""Whatever AutoTokenizer and AutoProcessor read comes along into every result, and no result points to absent code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mhconvert import api
from mhconvert.convert.checkpoint import provenance
from mhconvert.convert.donor.carried_files import carry_files
from mhconvert.convert.donor.tokenizer_files import load_tokenizer
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import UnsupportedError
from mhconvert.hub.published_files import split_files
from tests.donors import make_donor, make_tokenizer

TEMPLATES = {"default": "{{ messages[0]['content'] }}", "tool_use": "TOOLS {{ messages[0]['content'] }}"}
TOOL_USE = "additional_chat_templates/tool_use.jinja"
AUTO_MAP = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


def test_all_that_is_read_comes_along(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    carried = (
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", TOOL_USE),
        *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
        *("generation_config.json", "LICENSE"),
    )
    for name in (*carried, "config.json", "model.safetensors", "tokenization_x.py", "README.md"):
        (source / name).write_text(f'{{"name": "{name}"}}', encoding="utf-8")
    carry_files(source, target)
    found = {
        path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()
    }
    assert found == {name: f'{{"name": "{name}"}}' for name in carried}


@pytest.mark.parametrize(
    ("auto_map", "code", "kept"),
    [
        ({"AutoTokenizer": ["tokenization_x.X", None]}, False, None),
        ({"AutoTokenizer": ["tokenization_x.X", None]}, True, {"AutoTokenizer": ["tokenization_x.X", None]}),
        (["tokenization_x.X", None], True, {"AutoTokenizer": ["tokenization_x.X", None]}),
        ({"AutoTokenizer": ["org/name--tokenization_y.Y", None]}, False, None),
        (
            {"AutoTokenizer": ["org/name--tokenization_y.Y", None], "AutoProcessor": "processing_x.X"},
            True,
            {"AutoTokenizer": ["org/name--tokenization_y.Y", None]},
        ),
    ],
)
def test_an_auto_map_without_its_code_is_dropped(
    tmp_path: Path, auto_map: Any, code: bool, kept: dict[str, Any] | None
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    settings = {"auto_map": auto_map, "tokenizer_class": "X"}
    for name in ("tokenizer_config.json", "processor_config.json"):
        (source / name).write_text(json.dumps(settings), encoding="utf-8")
    (source / "tokenization_x.py").write_text("class X: ...", encoding="utf-8")
    carry_files(source, target, code=code)
    for name in ("tokenizer_config.json", "processor_config.json"):
        assert json.loads((target / name).read_text()) == {"tokenizer_class": "X"} | (
            {"auto_map": kept} if kept else {}
        )
    assert (target / "tokenization_x.py").exists() == ("tokenization_x" in str(kept))


def test_only_code_of_the_tokenizer_itself_needs_trust(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps(settings | {"auto_map": {"AutoProcessor": "processing_x.X"}}), encoding="utf-8"
    )
    assert load_tokenizer(tmp_path, False).decode([0]) == "<|bos|>"
    for auto_map in ({"AutoTokenizer": ["tokenization_x.X", None]}, ["tokenization_x.X", None]):
        file.write_text(json.dumps(settings | {"auto_map": auto_map}), encoding="utf-8")
        with pytest.raises(UnsupportedError, match="runs code of its own"):
            load_tokenizer(tmp_path, False)


def test_a_stock_config_points_to_no_code(tmp_path: Path) -> None:
    provenance.write_model_config(tmp_path, LlamaConfig(auto_map=AUTO_MAP), LlamaForCausalLM, torch.float16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in written
    assert (written["architectures"], written["dtype"]) == (["LlamaForCausalLM"], "float16")


def test_a_conversion_and_what_is_made_of_it(tmp_path: Path) -> None:
    """Uniform heads: the result is a plain Llama; healed, and exported."""
    donor = make_donor(tmp_path / "donor")
    tokenizer = AutoTokenizer.from_pretrained(donor)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(donor)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("The boats came home in the evening. " * 400, encoding="utf-8")
    recipe = Recipe(
        model=str(donor),
        method="dha",
        settings=DHASettings(kv_budget=0.5, uniform=True),
        effort="quick",
        output=str(tmp_path / "converted"),
        calibration=Calibration(tokens=128, sequence_length=32, held_out=2),
        verify=False,
    )
    api.convert(recipe)
    healing = HealSettings(tokens=64, data=str(text), sequence_length=32, batch_tokens=64, held_out=1)
    api.heal(str(tmp_path / "converted"), healing, output=str(tmp_path / "healed"), verify=False)
    for folder in (tmp_path / "converted", tmp_path / "healed"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
        assert type(AutoConfig.from_pretrained(folder)) is LlamaConfig
        assert "auto_map" not in (folder / "config.json").read_text()
        assert provenance.read_record(folder)["sha256"].keys() >= {TOOL_USE, "chat_template.jinja"}
        assert Path(TOOL_USE) in split_files(folder)[0]
