"""Routed heads on decoupled heads and on latents: what is the donor's exactly, and what is left out.

Tolerances: 0.0 where the same products are made in the same order; float32 rounding where sums are made in another.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh import modeling_moh
from mhconvert.convert.methods.moh.method import MoH
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.methods.registry import register
from mhconvert.convert.methods.routed import modeling_moh_mla
from mhconvert.errors import UnsupportedError
from tests.convert.conversions import converted, donor_model, logits, relative, token_ids

FLOAT32 = 2e-5
HALF = MoHSettings(0.5, 0.25, uniform=True)
FIRST = {
    "dha": DHASettings(kv_budget=0.75),
    "dha equal": DHASettings(kv_budget=1.0, equal_heads=True),
    "mla": MLASettings(kv_budget=0.6, kv_bits="16"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "mistral with windows": {"family": "mistral", "sliding_window": 7},
    "gemma2": {"family": "gemma2", "sliding_window": 7, "attn_logit_softcapping": 5.0},
    "phi3": {"family": "phi3", "rope": {"partial_rotary_factor": 0.5}, "pad_token_id": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _classes() -> None:
    register("moh")


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are left out whatever the length."""
    for name in ("LEAST_KEYS", "LEAST_KEYS_OF_A_STEP", "LEAST_KEYS_OF_A_ROW"):
        monkeypatch.setattr(modeling_moh, name, 0)
    monkeypatch.setattr(modeling_moh_mla, "LEAST_KEYS_OF_A_STEP", 0)


def first_of(kind: str, **family: Any) -> Any:
    return converted(donor_model(**{"heads": 8, "kv_heads": 4} | family), FIRST[kind])


@torch.no_grad()
def by_steps(model: Any, ids: Tensor, *lengths: int) -> Tensor:
    """Logits of `ids` read with a cache, in parts of these lengths, then a token at a time."""
    cache, found, begin = DynamicCache(config=model.config), [], 0
    for length in (*lengths, *[1] * (ids.shape[1] - sum(lengths))):
        found.append(model(input_ids=ids[:, begin : begin + length], past_key_values=cache).logits)
        begin += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, name) for kind in ("dha", "mla") for name in FAMILIES), ("dha equal", "llama")],
)
def test_with_all_heads_it_is_the_converted_donor(kind: str, family: str) -> None:
    donor, ids = first_of(kind, **FAMILIES[family]), token_ids(2, 24)
    whole = converted(donor, MoHSettings(1.0, 0.25))
    assert torch.equal(logits(whole, ids), logits(donor, ids))
    assert torch.equal(by_steps(whole, ids, 9, 3), by_steps(donor, ids, 9, 3))


def test_on_dha_without_fusion_it_is_moh_on_the_donor() -> None:
    donor, ids = donor_model(heads=4, kv_heads=2, layers=3), token_ids(2, 24)
    same = converted(donor, DHASettings(kv_budget=1.0))
    on_same, on_donor = converted(same, HALF), converted(donor, HALF)
    assert on_same.config.shared_heads == on_donor.config.shared_heads
    assert relative(logits(on_same, ids), logits(on_donor, ids)) < FLOAT32
    assert relative(logits(on_same, ids), logits(donor, ids)) > 1e-3


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("router", ["learned", "norm"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral with windows"])
@pytest.mark.parametrize("kind", ["dha", "mla"])
def test_what_is_left_out_is_what_is_masked(
    kind: str, family: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(first_of(kind, **FAMILIES[family]), MoHSettings(0.5, 0.25, router=router, uniform=True))
    ids = token_ids(3, 24)
    left_out, steps = logits(model, ids), by_steps(model, ids, 9, 3)
    monkeypatch.setattr(modeling_moh.MixtureOfHeadAttention, "can_skip", lambda *_: False)
    masked, masked_steps = logits(model, ids), by_steps(model, ids, 9, 3)
    assert relative(left_out, masked) < FLOAT32
    assert relative(steps, masked_steps) < FLOAT32
    assert relative(steps, masked) < FLOAT32


@pytest.mark.usefixtures("skipping")
def test_an_absorbed_step_has_rows_of_active_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = converted(first_of("mla"), HALF), token_ids(2, 12)
    widths, rows = [], modeling_moh_mla.RoutedLatentAttention.absorbed_rows

    def counted(*given: Any) -> Tensor:
        widths.append(tuple(given[-1].shape))
        return rows(*given)

    monkeypatch.setattr(modeling_moh_mla.RoutedLatentAttention, "absorbed_rows", counted)
    by_steps(model, ids, 10)
    assert widths == [(2, 1, 4)] * 4  # two steps, two layers: four of eight heads


@pytest.mark.parametrize("kind", ["dha", "mla"])
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    model, ids = converted(first_of(kind), HALF), token_ids(1, 10)
    padded = torch.cat((torch.full((1, 4), 5), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)), dim=1)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=mask, position_ids=places)[:, 4:]
    assert relative(found, logits(model, ids)) < FLOAT32


def test_a_config_comes_back_from_its_file(tmp_path: Any) -> None:
    for kind in ("dha", "mla"):
        model = converted(first_of(kind), HALF)
        model.config.save_pretrained(tmp_path)
        back = type(model.config).from_pretrained(tmp_path)
        assert back.model_type == f"moh_{kind}_llama"
        assert back.active_heads == model.config.active_heads
        assert back.layer_routing(1) == model.config.layer_routing(1)


def test_what_cannot_be_routed_is_refused() -> None:
    config = first_of("dha").config
    with pytest.raises(UnsupportedError, match="choose --route heads"):
        MoH(config, MoHSettings(0.5, 0.0, route="groups"), "quick")
    unfused = copy.deepcopy(config)
    unfused.k_fusion = [[0]] * unfused.num_hidden_layers
    with pytest.raises(UnsupportedError, match="mhconvert heal CKPT --fusion 2 first"):
        MoH(unfused, HALF, "quick")
