"""Every family at its full rank is its donor: each layer, the logits, cached reading past a window, the cache.

Tolerance: float32, as in `test_identity`; the QK-norms' reciprocal roots add a rounding each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.families.facts import FAMILIES, attention_facts
from mhconvert.convert.methods.mla.settings import MLASettings
from tests.convert.conversions import attention_inputs, converted, donor_model, logits, relative, token_ids

FLOAT32 = 2e-5
LENGTH, WINDOW = 40, 12
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LOCAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRANITE = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "ministral": KINDS,
    "cwm": KINDS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3": {"head_dim": 32},
    "qwen3-biased": {"attention_bias": True},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "gemma": {"head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    | KINDS,
    "gemma3_text": {"query_pre_attn_scalar": 20, "rope_parameters": LOCAL} | KINDS,
    "phi3": {"pad_token_id": 1},
    "phi3-partial": {"pad_token_id": 1, "rope": {"partial_rotary_factor": 0.5}, "sliding_window": WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"rope_parameters": LOCAL} | KINDS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": GRANITE,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2} | GRANITE,
    "stablelm": {"use_qkv_bias": True, "rope": {"partial_rotary_factor": 0.25}},
    "stablelm-parallel": {"use_parallel_residual": True, "rope": {"partial_rotary_factor": 0.5}},
    "starcoder2": {"use_bias": True, "sliding_window": WINDOW},
    "arcee": {},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
}


def donor_of(variant: str, seed: int = 0, **config: Any) -> Any:
    """A random donor of the variant, its attention biases as large as its products."""
    donor = donor_model(seed, family=variant.split("-")[0], **(VARIANTS[variant] | config))
    for name, weight in donor.named_parameters():
        if "self_attn" in name and name.endswith("_proj.bias"):
            weight.data *= 10
    donor.set_attn_implementation(donor.config._attn_implementation)
    return donor


def full_rank(config: Any) -> MLASettings:
    facts = attention_facts(config)
    rope = facts.kv_heads * facts.rotary_dim
    return MLASettings(kv_lora_rank=2 * facts.kv_heads * facts.head_dim - rope, qk_rope_head_dim=rope)


@torch.no_grad()
def by_steps(model: Any, ids: Tensor, prefill: int) -> Tensor:
    """Logits of `ids` read as a prefill and then token by token."""
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=ids[:, :prefill], past_key_values=cache).logits]
    for step in range(prefill, ids.shape[1]):
        parts.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def test_every_family_has_a_variant() -> None:
    converted_families = {name for name, family in FAMILIES.items() if family.refused is None}
    assert {variant.split("-")[0] for variant in VARIANTS} == converted_families


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_full_rank_is_the_donor(variant: str) -> None:
    donor = donor_of(variant)
    model, ids = converted(donor, full_rank(donor.config)), token_ids(2, LENGTH, seed=7)
    expected = logits(donor, ids)
    assert relative(logits(model, ids), expected) < FLOAT32
    assert relative(by_steps(model, ids, 20), expected) < FLOAT32
    assert relative(by_steps(model, ids, 1), expected) < FLOAT32

    facts = attention_facts(donor.config)
    sizes = [cache_storage(m(input_ids=ids[:, :8]).past_key_values)[1] for m in (model, donor)]
    assert sizes[0] == sizes[1] + facts.key_scales * 2 * 8 * 2  # rows, tokens, layers
    for stock, latent, x in zip(
        donor.model.layers, model.model.layers, attention_inputs(donor, ids[:1, :1]), strict=True
    ):
        assert latent.self_attn.scaling == pytest.approx(stock.self_attn.scaling)
        assert x.shape == (1, 1, 64)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3-partial"])
def test_a_compressed_model_reads_alike_with_and_without_its_cache(variant: str) -> None:
    model, ids = converted(donor_of(variant, kv_heads=1)), token_ids(2, LENGTH)
    assert relative(by_steps(model, ids, 17), logits(model, ids)) < FLOAT32
    pad, mask = 9, torch.ones_like(ids)
    mask[1, :pad] = 0
    padded = logits(model, ids * mask, attention_mask=mask)
    alone = logits(model, ids[1:, pad:])
    assert relative(padded[1, pad:], alone[0]) < FLOAT32


@pytest.mark.parametrize("variant", ["mistral", "gemma2", "gemma3_text", "olmo2", "qwen3"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=["beams", "static"]
)
def test_generation_past_a_window_is_generation_without_a_cache(
    variant: str, options: dict[str, Any]
) -> None:
    model = converted(donor_of(variant, head_dim=16))
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    inputs = {"input_ids": token_ids(2, 9) * mask + (1 - mask), "attention_mask": mask}
    plain = {key: value for key, value in options.items() if key != "cache_implementation"}
    expected = model.generate(**inputs, **settings, **plain, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, **options, disable_compile=True), expected)


@pytest.mark.parametrize("variant", ["qwen3", "gemma2", "gemma3_text", "olmo", "olmo2", "stablelm"])
def test_bfloat16_reads_with_and_without_a_cache(variant: str) -> None:
    model, ids = converted(donor_of(variant)).to(torch.bfloat16), token_ids(1, 16)
    whole, stepped = logits(model, ids), by_steps(model, ids, 6)
    assert whole.dtype == torch.bfloat16
    # 8 bits a number, a few roundings in each of two layers, and a score's share of them in its exponential.
    assert relative(stepped.float(), whole.float()) < 0.1
