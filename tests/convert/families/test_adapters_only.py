"""Families whose attention is not rewritten: refused by what it has. They open, take adapters and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.methods.refusals import refusals
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import UnsupportedError
from tests.donors import make_donor

REASONS = {
    "smollm3": "some of its layers have no RoPE",
    "cohere": "its RoPE turns neighbouring elements",
    "cohere2": "its RoPE turns neighbouring elements .*; some of its layers have no RoPE",
    "glm": "its RoPE turns neighbouring elements",
    "glm4": "its RoPE turns neighbouring elements",
    "ernie4_5": "its RoPE turns neighbouring elements",
    "gpt_oss": r"its softmax has learned sinks \(self_attn\.sinks\)",
    "granite_swa": r"its softmax has learned sinks \(self_attn\.sinks\)",
}
SMALL: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2, "sliding_window": None},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "granite_swa": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "tied": False},
}
IDS = torch.arange(2, 26).view(2, 12)


def test_every_refused_family_is_here() -> None:
    assert {name for name, family in FAMILIES.items() if family.refused} == set(REASONS)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", REASONS)
def test_it_is_refused_by_what_it_has_and_adapted(family: str, tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "donor", family=family, pad_token_id=1, **SMALL.get(family, {}))
    verdicts = refusals(AutoConfig.from_pretrained(folder))
    assert [name for name, reason in verdicts.items() if reason is None] == ["hydra"]
    with pytest.raises(UnsupportedError, match=f"mla cannot convert this donor: {REASONS[family]}"):
        api.convert(Recipe(model=str(folder), method="mla", output=str(tmp_path / "mla")))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits(stock)
    assert logits(open_donor(str(folder)).model("cpu")).allclose(expected, atol=1e-5)  # float32 rounding
    recipe = Recipe(
        model=str(folder),
        method="hydra",
        settings=HydraSettings(r_par=2, r_seq=2),
        output=str(tmp_path / "adapter"),
    )
    api.convert(recipe)
    api.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(merged) is type(stock)
    assert logits(merged).allclose(expected, atol=1e-5)
