"""The shipped model as a citizen of transformers: casts, training, recorded attention, configuration, cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.methods.mla import register
from mhconvert.convert.methods.mla.configuration_mla import MLALlamaConfig, latent_tp_plan
from mhconvert.convert.methods.mla.converted_class import latent_config
from mhconvert.convert.methods.mla.modeling_mla import LatentAttention
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.mla.slot_embeddings import turns
from tests.convert.conversions import LLAMA3, YARN, converted, donor_model, logits, relative, token_ids
from tests.donors import make_config

RANKS, FREQUENCIES = [20, 12], [[0, 0, 3], [1, 7]]


def sized_config(family: str = "llama", **config: Any) -> Any:
    """A latent configuration with sizes that differ from layer to layer."""
    config = latent_config(make_config(family=family, sliding_window=None, **config), output_bias=True)
    config.kv_lora_rank, config.rope_frequencies = list(RANKS), copy.deepcopy(FREQUENCIES)
    return config


def model_of(config: Any) -> Any:
    """A random model of a latent configuration."""
    register()
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def model() -> Any:
    return converted(donor_model())


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {}], ids=["llama3", "yarn", "default"])
def test_a_cast_keeps_the_frequencies_exact(rope: dict[str, Any]) -> None:
    model = converted(donor_model(rope=rope))
    exact = model.model.rotary_emb.inv_freq.clone()
    for cast in (model.to(torch.bfloat16), model.half(), model.model.to(torch.bfloat16)):
        rotary = getattr(cast, "model", cast).rotary_emb
        assert rotary.inv_freq.dtype == torch.float32
        assert torch.equal(rotary.inv_freq, exact)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}


def test_a_bfloat16_load_keeps_the_frequencies_exact(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = token_ids(1, 20)
    # bfloat16 keeps 8 bits; a few roundings in each of two layers.
    assert relative(logits(loaded, ids).float(), logits(model, ids)) < 0.05


def test_a_save_and_a_load_are_the_same_bits(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, token_ids(2, 20)), logits(model, token_ids(2, 20)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of the language-modelling loss, by parameter name."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(model: Any) -> None:
    model, ids = copy.deepcopy(model).train().requires_grad_(True), token_ids(2, 16)
    plain = gradients(model, ids)
    assert all(g is not None and g.abs().max() > 0 for g in plain.values())
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    checkpointed = gradients(model, ids)
    for name, gradient in plain.items():
        assert gradient is not None
        torch.testing.assert_close(checkpointed[name], gradient)  # the same operations a second time


def test_dropout_drops_on_short_sequences_too(model: Any) -> None:
    """A cache is there by default when a loss is asked for, and few tokens meet it."""
    model, ids = copy.deepcopy(model).train(), token_ids(1, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        dropped = [model(input_ids=ids, attention_mask=mask).logits for _ in range(2)]
    assert relative(dropped[0][:, 1:], whole[:, 1:]) > 1e-2
    assert relative(dropped[0][:, 1:], dropped[1][:, 1:]) > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_eager_records_one_weight_tensor_per_layer(family: str) -> None:
    model = model_of(sized_config(family)).eval()
    model.set_attn_implementation("eager")
    ids = token_ids(2, 9)
    with torch.no_grad():
        whole = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        cache = DynamicCache()
        model(input_ids=ids[:, :8], past_key_values=cache)
        step = model(input_ids=ids[:, 8:], past_key_values=cache, output_attentions=True)
    assert [tuple(w.shape) for w in whole.attentions] == [(2, 4, 9, 9)] * 2
    assert len(whole.hidden_states) == 3
    for weights, last in zip(whole.attentions, step.attentions, strict=True):
        # Shares of one: float32 rounding of the softmax alone.
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9), atol=1e-5, rtol=0)
        torch.testing.assert_close(last, weights[:, :, 8:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_configuration_round_trip(family: str, tmp_path: Path) -> None:
    config = sized_config(family, rope=YARN)
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.transformers_version}
    assert loaded.rope_parameters == config.rope_parameters
    assert loaded.model_type == f"mla_{family}"
    assert [loaded.latent_rank(n) for n in range(2)] == RANKS
    assert [loaded.layer_frequencies(n) for n in range(2)] == FREQUENCIES


@pytest.mark.parametrize("together", [False, True], ids=["apart", "rope_in_latent"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("widths", [[10, 3], [0, 16], 5], ids=str)
def test_key_widths_of_each_layer(
    family: str, widths: int | list[int], together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expanded form without a cache is the absorbed form on one, whatever the widths; an int is for all layers."""
    config = sized_config(family)
    config.qk_nope_head_dim, config.rope_in_latent = widths, together
    model, generator = model_of(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.model.layers.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    ids, expanded, expand = token_ids(2, 12), [], LatentAttention.expand_kv
    monkeypatch.setattr(LatentAttention, "expand_kv", lambda *a: expanded.append(1) or expand(*a))
    with torch.no_grad():
        cache = DynamicCache(config=config)
        first = model(input_ids=ids[:, :7], past_key_values=cache).logits
        expanded.clear()
        rest = model(input_ids=ids[:, 7:], past_key_values=cache).logits
    assert not expanded
    assert relative(torch.cat((first, rest), dim=1), logits(model, ids)) < 1e-5
    assert len(expanded) == 2
    for index, layer in enumerate(model.model.layers):
        width = widths[index] if isinstance(widths, list) else widths
        assert layer.self_attn.kv_b_proj.out_features == 4 * (width + 16)


def test_a_configuration_without_sizes_says_so() -> None:
    config = MLALlamaConfig(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"config\.json lacks qk_nope_head_dim"):
        config.nope_width(0)
    with pytest.raises(ValueError, match=r"config\.json lacks kv_lora_rank"):
        config.latent_rank(0)
    with pytest.raises(ValueError, match=r"config\.json lacks rope_frequencies"):
        config.layer_frequencies(0)


def test_the_parallel_plan_divides_what_belongs_to_heads() -> None:
    plan = latent_tp_plan({"layers.*.self_attn.k_proj": "colwise", "layers.*.mlp.up_proj": "colwise"})
    held = {name.split(".")[-1] for name in plan}
    assert held == {"q_proj", "kv_b_proj", "o_proj", "up_proj"}  # the cache, from kv_a, serves every head
    assert set(MLALlamaConfig.base_model_tp_plan) > set(plan) - {"layers.*.mlp.up_proj"}


def expect_cache(model: Any, widths: list[tuple[int, int]]) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=token_ids(2, 5), past_key_values=cache)
        model(input_ids=token_ids(2, 1), past_key_values=cache)
    for layer, (rank, rope) in zip(cache.layers, widths, strict=True):
        assert layer.keys.shape == (2, 1, 6, rank)
        assert layer.values.shape == (2, 1, 6, rope)
    assert cache_storage(cache)[1] == 2 * 6 * sum(map(sum, widths))


def test_the_cache_is_latent_and_rotary_key_alone() -> None:
    expect_cache(model_of(sized_config()).eval(), [(20, 6), (12, 4)])
    config = sized_config("mistral")
    config.kv_lora_rank = 17  # one for all layers
    expect_cache(model_of(config).eval(), [(17, 6), (17, 4)])


@pytest.mark.parametrize(("profile", "kind"), [("quality", list), ("portable", int)])
def test_the_profile_decides_the_kind_of_rank(profile: Any, kind: type) -> None:
    model = converted(donor_model(head_dim=64), MLASettings(kv_budget=0.5, profile=profile, kv_bits="16"))
    assert isinstance(model.config.kv_lora_rank, kind)
    assert isinstance(model.config.qk_nope_head_dim, kind)
    assert profile == "quality" or model.config.qk_nope_head_dim == 64
    sizes = {model.config.latent_rank(n) + 2 * len(model.config.layer_frequencies(n)) for n in range(2)}
    assert sizes == {128}
    for layer in model.model.layers:
        assert (layer.self_attn.o_proj.bias is not None) == (profile == "quality")
        if profile == "portable":
            assert layer.self_attn.rope_frequencies == list(range(32))


def test_the_shared_rotary_key_turns_with_its_own_frequencies() -> None:
    attention = model_of(sized_config()).model.layers[1].self_attn
    cos = torch.arange(16.0).expand(1, 3, 16)
    found = turns(cos, cos + 100, attention.rope_frequencies)
    assert found[0, 0].tolist() == [[1, 101], [7, 107]]
