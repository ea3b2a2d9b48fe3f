"""What a user may choose, and the refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mhconvert.convert.methods.mla.coded_method import CodedMLA
from mhconvert.convert.methods.mla.method import MLA
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.registry import build_method
from mhconvert.errors import BudgetError, UnsupportedError
from tests.donors import make_config


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"kv_budget": 0}, r"kv_budget=0 is outside \(0, 1\]; it is a share of the donor's KV cache"),
        ({"kv_budget": -0.5}, r"kv_budget=-0\.5 is outside \(0, 1\]"),
        ({"kv_budget": 50}, r"kv_budget=50 is outside \(0, 1\]"),
        ({"kv_budget": float("nan")}, r"kv_budget=nan is outside \(0, 1\]"),
        ({"kv_lora_rank": 8}, "kv_lora_rank and qk_rope_head_dim go together; give both, or kv_budget alone"),
        ({"qk_rope_head_dim": 8}, "kv_lora_rank and qk_rope_head_dim go together"),
        ({"profile": "stock"}, "profile 'stock' is not one of quality, portable"),
    ],
)
def test_refusals(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        MLASettings(**choice)


def test_the_ends_of_the_range_are_allowed() -> None:
    assert MLASettings(kv_budget=1).kv_budget == 1
    assert MLASettings(kv_budget=1e-9).kv_budget == 1e-9
    assert MLASettings() == MLASettings(kv_budget=0.5, profile="quality", kv_bits="auto")


def test_the_cache_is_coded_unless_elements_are_asked_for() -> None:
    assert MLASettings().kv_bits == "auto"
    assert MLASettings().coded
    for choice in ({"profile": "portable"}, {"kv_lora_rank": 8, "qk_rope_head_dim": 8}, {"kv_bits": 16}):
        settings = MLASettings(**choice)  # type: ignore[arg-type]
        assert settings.kv_bits == "16"
        assert not settings.coded
    assert MLASettings(kv_bits="auto", profile="portable") == MLASettings(kv_bits="16", profile="portable")
    assert MLASettings(profile="portable").at_budget(0.25).kv_bits == "16"


@pytest.mark.parametrize(
    ("choice", "kind"),
    [({}, CodedMLA), ({"kv_bits": 4}, CodedMLA), ({"kv_bits": 16}, MLA), ({"profile": "portable"}, MLA)],
)
def test_the_settings_decide_what_is_built(choice: dict[str, Any], kind: type) -> None:
    assert type(build_method("mla", make_config(head_dim=64), MLASettings(**choice), "quick")) is kind


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLASettings().kv_budget = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"kv_budget": 0.01}, BudgetError, r"the nearest that it can: 0\.0469 \(3 elements\)"),
        (
            {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "profile": "portable"},
            UnsupportedError,
            "--profile portable cannot express head_dim=16",
        ),
    ],
)
def test_the_method_refuses_before_it_reads_weights(
    choice: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        MLA(make_config(), MLASettings(**choice, kv_bits="16"), "quick")


def test_the_method_refuses_a_donor_it_cannot_carry_over() -> None:
    with pytest.raises(UnsupportedError, match=r"clip_qkv=8\.0 is not supported"):
        MLA(make_config(family="olmo", clip_qkv=8.0), MLASettings(kv_bits="16"), "quick")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"family": "gemma2"}, "its scores have a softcap of 50.0"),
        ({"family": "mistral", "sliding_window": 64}, "sliding_window=64"),
        ({"family": "qwen3"}, "its keys have a norm .head., whose RMS would have to be cached too"),
    ],
)
def test_portable_refuses_what_no_served_class_holds(config: dict[str, Any], words: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"profile portable cannot hold this donor: {words}; use quality"
    ):
        MLA(make_config(**config), MLASettings(profile="portable"), "quick")


def test_portable_keeps_the_donors_biases_and_adds_none() -> None:
    wide = {"head_dim": 64}
    for config, kept in (({}, False), ({"attention_bias": True}, True), ({"family": "qwen2"}, False)):
        method = MLA(make_config(**wide, **config), MLASettings(profile="portable"), "quick")
        assert method.config.attention_output_bias is kept


@pytest.mark.parametrize("effort", ["quick", "default", "high"])
@pytest.mark.parametrize("profile", ["quality", "portable"])
def test_the_plan_counts_the_cache_that_is_granted(effort: str, profile: Any) -> None:
    method = MLA(make_config(layers=3, head_dim=64), MLASettings(0.4, profile=profile, kv_bits="16"), effort)
    assert method.kv_elements() == 3 * round(0.4 * 256)
    sizes = method.layer_sizes(0)
    divided = profile == "quality" and effort != "quick"  # by a survey, later
    assert sizes.get("kv_elements") == (None if divided else 102)
    if profile == "portable":
        assert (sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]) == (38, 64)


def test_another_budget_is_the_same_otherwise() -> None:
    settings = MLASettings(kv_budget=0.25, profile="portable")
    assert settings.at_budget(0.75) == MLASettings(kv_budget=0.75, profile="portable")
    with pytest.raises(BudgetError, match="leave them out to vary it"):
        MLASettings(kv_lora_rank=8, qk_rope_head_dim=8).at_budget(0.75)
