"""A tokenizer with code of its own: exports run it and take it along with --trust-remote-code, and else refuse it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mhconvert import api
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import UnsupportedError
from tests.convert.export.dha_exports import Maps, make_dha
from tests.donors import make_donor

CODE = """from transformers import PreTrainedTokenizerFast

from .spelling import GREETING


class Words(PreTrainedTokenizerFast):
    greeting = GREETING
"""
MAPS: Maps = [([0, 1, 1, 0], [1, 0, 0, 1])]  # groups of two that no donor's class holds as they are


def with_code(folder: Path) -> Path:
    """The folder, whose tokenizer now has code in words.py, which imports spelling.py."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    file.write_text(json.dumps(settings), encoding="utf-8")
    (folder / "words.py").write_text(CODE, encoding="utf-8")
    (folder / "spelling.py").write_text('GREETING = "hello"\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoints(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conversion of each method."""
    place = tmp_path_factory.mktemp("code")
    donor = with_code(make_donor(place / "donor", head_dim=64, layers=1))
    portable = MLASettings(kv_budget=0.6, profile="portable")
    asked: dict[str, Any] = {"model": str(donor), "settings": portable, "effort": "quick", "fit_steps": 0}
    api.convert(recipe(place / "mla", trust_remote_code=True, **asked))
    return {"mla": place / "mla", "dha": with_code(make_dha(place / "heads", MAPS))}


@pytest.mark.parametrize(
    ("method", "form"),
    [("mla", "deepseek_v3"), ("mla", "own"), ("dha", "llama"), ("dha", "nemotron-nas")],
)
def test_an_export_takes_the_code_along(
    checkpoints: dict[str, Path], tmp_path: Path, method: str, form: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="runs code of its own .*--trust-remote-code allows it"):
        api.export(str(checkpoints[method]), form, str(out), device="cpu")
    assert not out.exists()
    report = api.export(str(checkpoints[method]), form, str(out), device="cpu", trust_remote_code=True)
    assert report["verified"]["greedy_equal"]
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).greeting == "hello"


def test_a_gguf_file_has_the_vocabulary_of_that_tokenizer(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="runs code of its own"):
        api.export(str(checkpoints["mla"]), "gguf", str(tmp_path / "a.gguf"))
    report = api.export(str(checkpoints["mla"]), "gguf", str(tmp_path / "a.gguf"), trust_remote_code=True)
    assert report["dense_form_verified"]["greedy_equal"]
    assert (tmp_path / "a.gguf").is_file()
