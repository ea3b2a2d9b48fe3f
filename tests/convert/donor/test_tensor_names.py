"""Stored names, fused experts and tied embeddings resolve as in transformers; what does not is refused with reasons."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import CheckpointError
from tests.convert.methods.mla.test_families_exact import VARIANTS
from tests.donors import make_config, make_donor, make_model, write_weights

MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe"]


def published(folder: Path, family: str) -> Path:
    """A random donor as transformers saves it: under the names of the Hub."""
    make_model(make_config(family=family, **VARIANTS[family])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MIXTURES)
def test_published_experts_are_transformers_own(family: str, tmp_path: Path) -> None:
    folder = published(tmp_path, family)
    stored = set(load_file(folder / "model.safetensors"))
    source = open_donor(str(folder)).source
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert stored != set(source.names())
    assert set(source.names()) == set(expected) - {"lm_head.weight"}
    for name in source.names():
        assert torch.equal(source.read(name), expected[name]), name
        assert source.shape(name) == tuple(expected[name].shape)
        assert source.nbytes(name) == 4 * expected[name].numel()


def test_an_expert_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, "qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    write_weights(folder, weights)
    words = r"model\.layers\.1\.mlp\.experts\.gate_up_proj: an expert of 0 … 3 lacks a tensor"
    with pytest.raises(CheckpointError, match=words):
        _ = open_donor(str(folder)).source


def test_a_tensor_that_is_stored_twice_is_named(tmp_path: Path) -> None:
    folder = make_donor(tmp_path)
    weights = load_file(folder / "model.safetensors")
    again = "model.layers.0.mlp.up_proj.weight"
    write_weights(folder, weights | {again.removeprefix("model."): torch.zeros_like(weights[again])})
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(again)} is stored more than once: .*remove all but"
    ):
        _ = open_donor(str(folder)).source


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "names without the prefix": lambda w: {name.removeprefix("model."): t for name, t in w.items()},
    "the prefix on the head too": lambda w: w | {f"model.{HEAD}": w[EMBEDDING].clone()},
    "a tied model with its head alone": lambda w: {
        HEAD if name == EMBEDDING else name: t for name, t in w.items()
    },
    "a tied model with an equal head": lambda w: w | {HEAD: w[EMBEDDING].clone()},
    "a tied model with another head": lambda w: w | {HEAD: 1.5 * w[EMBEDDING] + 0.01},
}


def changed(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A tied random donor with its stored tensors changed."""
    write_weights(folder, change(load_file(make_donor(folder) / "model.safetensors")))
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_names_and_ties_resolve_as_in_transformers(change: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, CHANGES[change])
    ids = torch.arange(24)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    donor = open_donor(str(folder))
    assert torch.equal(donor.model("cpu")(ids).logits, expected)
    differ = change == "a tied model with another head"
    assert donor.config.tie_word_embeddings is not differ
    assert (HEAD in donor.outer_tensor_names()) == differ
    assert ("not tied as the config says" in (donor.notice or "")) == differ


def test_a_head_that_differs_is_converted_as_it_is(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = changed(tmp_path / "donor", CHANGES["a tied model with another head"])
    written = tmp_path / "converted"
    every_head = MoHSettings(active=1.0, shared=1.0)
    asked = recipe(written, model=str(folder), method="moh", settings=every_head, fit_steps=0)
    assert mhconvert.convert(asked)["kl"] == 0
    weights = load_file(written / "model.safetensors")
    assert torch.equal(weights[HEAD], 1.5 * weights[EMBEDDING] + 0.01)
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: {f"module.{name}": t for name, t in w.items()},
            "it is there as module.model.embed_tokens.weight, which transformers does not find: remove 'module.'",
        ),
        (
            lambda w: {name: t for name, t in w.items() if name != "model.norm.weight"},
            "download the checkpoint",
        ),
    ],
)
def test_the_reason_why_a_tensor_is_missing(change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        _ = open_donor(str(changed(tmp_path, change))).source


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    folder = make_donor(tmp_path, tied=False)
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    write_weights(folder, weights)
    with pytest.raises(
        CheckpointError, match=r'lm_head\.weight is missing .* set "tie_word_embeddings": true'
    ):
        _ = open_donor(str(folder)).source
