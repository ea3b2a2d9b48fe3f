"""Mixtures of experts are read as they are published, one tensor an expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mhconvert.convert.donor.donor import open_donor
from mhconvert.errors import CheckpointError
from tests.convert.methods.mla.test_families_exact import VARIANTS
from tests.donors import make_config, make_model, write_weights

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
