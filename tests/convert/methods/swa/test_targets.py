"""The table of stock classes: each row holds its donors to rounding, windows them right, and caches what is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhconvert.convert.bare_process.child import cache_storage, filled_cache
from mhconvert.convert.methods.swa.method import SWA
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.methods.swa.targets import NO_SINK, TARGETS, target_for, unheld
from mhconvert.errors import UnsupportedError
from tests.convert.conversions import (
    LLAMA3,
    assembled,
    converted_layers,
    donor_model,
    logits,
    relative,
    rotary_of,
    token_ids,
)
from tests.donors import DEFAULT_ROPE

WINDOW, LENGTH = 6, 24
EXACT = 1e-6  # of the logits' norm; float32, two layers
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BOTH_FULL = {"layer_types": ["full_attention"] * 2}
ONE_ROPE = dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT_ROPE)
# What a donor of each family is to have, so that the features that its target must hold are there.
DONORS: dict[str, dict[str, Any]] = {
    "llama": {"rope": LLAMA3, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "ministral": {"sliding_window": WINDOW, "tied": False, **BOTH_FULL},
    "qwen2": {"tied": False},
    "qwen2_moe": MOE,
    "qwen3": {"head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 20, "sliding_window": WINDOW, **BOTH_FULL},
    "gemma3_text": {"sliding_window": WINDOW, "rope_parameters": ONE_ROPE, **BOTH_FULL},
    "olmo2": {"tied": False, "rope": LLAMA3},
    "olmo3": {"sliding_window": WINDOW, **BOTH_FULL},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
}
ROWS = [(family, row.sinks) for row in TARGETS for family in row.donors]


def donor_of(family: str, **changes: Any) -> Any:
    return donor_model(family=family, **DONORS[family] | changes)


def settings_of(sinks: bool, **changes: Any) -> SWASettings:
    return SWASettings(window=WINDOW, context=LENGTH, sinks="learnt" if sinks else "none", **changes)


def brute_force(donor: Any, ids: torch.Tensor, windowed: list[int]) -> torch.Tensor:
    """The donor's logits when its layers in `windowed` get a mask of the last WINDOW tokens, made here."""
    position = torch.arange(ids.shape[1])
    distance = position[:, None] - position[None]
    seen = (distance >= 0) & (distance < WINDOW)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def narrow(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask}

    hooks = [
        donor.model.layers[index].self_attn.register_forward_pre_hook(narrow, with_kwargs=True)
        for index in windowed
    ]
    found = logits(donor, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("family", "sinks"), ROWS)
def test_without_windows_it_is_the_donor(family: str, sinks: bool) -> None:
    donor, ids = donor_of(family), token_ids(2, LENGTH)
    method = SWA(donor.config, settings_of(sinks, full_layers=[0, 1]), "quick")
    model = assembled(donor, method, converted_layers(donor, method, ids))
    assert relative(logits(model, ids), logits(donor, ids)) < EXACT
    assert model.config.model_type == method.target.model_type
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize(("family", "sinks"), ROWS)
def test_windowed_logits_equal_a_masked_donor(family: str, sinks: bool) -> None:
    """Sinks are taken out of it: what they add is compared in `test_surgery`."""
    donor, ids = donor_of(family), token_ids(2, LENGTH)
    method = SWA(donor.config, settings_of(sinks, full_layers=[1]), "quick")
    model = assembled(donor, method, converted_layers(donor, method, ids))
    if sinks:
        model.model.layers[0].self_attn.sinks.data.fill_(NO_SINK)
    expected = brute_force(donor, ids, [0])
    assert relative(logits(model, ids), expected) < EXACT
    assert relative(logits(donor, ids), expected) > 1e-3


@pytest.mark.parametrize(("family", "sinks"), ROWS)
def test_the_layer_of_the_pass_is_the_layer_of_the_class(family: str, sinks: bool) -> None:
    donor, ids = donor_of(family), token_ids(2, LENGTH)
    method = SWA(donor.config, settings_of(sinks, full_layers=[1]), "quick")
    layers = converted_layers(donor, method, ids)
    model = assembled(donor, method, layers)
    seen: list[torch.Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.extend((args[0] if args else kwargs["hidden_states"], output[0]))

    hook = model.model.layers[0].self_attn.register_forward_hook(keep, with_kwargs=True)
    logits(model, ids)
    hook.remove()
    found = layers[0](seen[0], rotary_of(donor, LENGTH))[0]
    assert relative(found, seen[1]) < EXACT


@pytest.mark.parametrize(("family", "sinks"), ROWS)
def test_decoding_with_the_class_own_cache_is_the_full_forward(family: str, sinks: bool) -> None:
    donor, ids = donor_of(family), token_ids(2, LENGTH)
    method = SWA(donor.config, settings_of(sinks, full_layers=[1]), "quick")
    model = assembled(donor, method, converted_layers(donor, method, ids))
    whole, cache, parts = logits(model, ids), None, []
    with torch.no_grad():
        for part in ids.split([WINDOW + 3, *[1] * (LENGTH - WINDOW - 3)], dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert relative(torch.cat(parts, dim=1), whole) < 1e-5
    planned = method.facts.kv_elements * (WINDOW + LENGTH)
    assert cache_storage(cache)[1] == planned * len(ids)
    with torch.no_grad():
        short = model(input_ids=ids[:1, :2], use_cache=True).past_key_values
        assert filled_cache(model, short, [LENGTH]) == [(4 * planned, planned)]
    assert method.kv_elements() == planned / LENGTH


def test_left_padding_changes_nothing() -> None:
    donor, ids = donor_of("llama"), token_ids(1, LENGTH)
    for sinks in (False, True):
        method = SWA(donor.config, settings_of(sinks, full_layers=[1]), "quick")
        model = assembled(donor, method, converted_layers(donor, method, ids))
        padded = torch.cat((torch.ones(1, 5, dtype=torch.long), ids), dim=1)
        mask = (torch.arange(LENGTH + 5) >= 5).long()[None]
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        found = logits(model, padded, attention_mask=mask, position_ids=position)[:, 5:]
        assert relative(found, logits(model, ids)) < 1e-5


def test_every_supported_class_exists() -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for row in TARGETS:
        assert hasattr(CONFIG_MAPPING[row.model_type], "layer_types")
        assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[row.model_type]]


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("stablelm", {}, "no stock class of transformers has a type for each layer of a stablelm model"),
        ("gemma3_text", {"rope_parameters": None}, "its full and its windowed layers have a RoPE each"),
        ("qwen3_moe", MOE, "no stock class of transformers has a type for each layer of a qwen3_moe model"),
    ],
)
def test_what_no_class_holds_is_refused_by_name(family: str, changes: dict[str, Any], reason: str) -> None:
    donor = donor_model(family=family, **changes)
    assert reason in str(unheld(donor.config))
    for sinks in ("learnt", "none"):
        with pytest.raises(
            UnsupportedError, match=f"sinks={sinks} needs a stock class: .*{reason}.*--sinks first"
        ):
            SWA(donor.config, SWASettings(sinks=sinks), "quick")
    assert target_for(donor.config, None).keeps_first


def test_sinks_that_no_class_holds_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="a norm of queries and keys; choose --sinks first, or none"):
        target_for(donor_of("qwen3").config, "learnt")


@pytest.mark.parametrize(
    ("family", "budget", "kind"),
    [
        ("llama", 0.8, "granite_swa"),
        ("llama", 1.0, "cwm"),
        ("qwen3", 0.8, "qwen3"),
        ("gemma", 0.8, "swa_gemma"),
    ],
)
def test_what_is_not_asked_for_is_what_engines_load(family: str, budget: float, kind: str) -> None:
    settings = SWASettings(budget, window=WINDOW, context=LENGTH)
    assert SWA(donor_model(family=family).config, settings, "quick").target.model_type == kind


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"eos_token_id": None},
        {"bos_token_id": None},
    ],
)
def test_a_llama_that_cwm_lacks_a_feature_of_goes_to_the_other_class(changes: dict[str, Any]) -> None:
    donor, ids = donor_model(**changes), token_ids(2, LENGTH)
    method = SWA(donor.config, settings_of(False, full_layers=[0, 1]), "quick")
    model = assembled(donor, method, converted_layers(donor, method, ids))
    assert method.target.model_type == "granite_swa"
    assert relative(logits(model, ids), logits(donor, ids)) < EXACT
