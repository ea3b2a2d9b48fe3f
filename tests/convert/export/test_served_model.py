"""The served class computes what the converted model computes, in every way of reading.

Tolerance: another order of float32 sums in two layers, 1e-5 of the logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.export.mla.own_layer import (
    EPS,
    EPS_FLOAT16,
    ServedShape,
    norm_weight,
    padded_value,
    refusal,
    served_tensors,
)
from mhconvert.convert.methods.mla.served.configuration_served import MLAServedLlamaConfig, latent_tp_plan
from mhconvert.convert.methods.mla.served.modeling_served import LatentRMSNorm, rotated
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.errors import CheckpointError, ExportError
from tests.convert.conversions import LINEAR, LLAMA3, YARN, logits, relative, token_ids
from tests.convert.export.served_models import portable, served
from tests.convert.methods.mla.test_decoding import in_chunks

FLOAT32 = 1e-5
DONORS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4, "seed": 2},
    "mqa": {"kv_heads": 1, "seed": 3},
    "llama3": {"rope": LLAMA3},
    "linear": {"rope": LINEAR},
    "yarn": {"rope": YARN},
    "untied": {"tied": False, "rms_norm_eps": 1e-3},
    "wide": {"head_dim": 128, "rope": LLAMA3},
    "qwen2": {"family": "qwen2", "seed": 4},
    "biased": {"attention_bias": True},
    "granite": {"family": "granite", "attention_multiplier": 0.07},
    "mistral": {"family": "mistral", "sliding_window": None},
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """With biases and scaled RoPE."""
    model = portable(family="qwen2", rope=LLAMA3)
    return model, served(model)


@pytest.mark.parametrize("donor", DONORS.values(), ids=DONORS)
def test_it_is_the_converted_model(donor: dict[str, Any]) -> None:
    model = portable(**donor)
    made, ids = served(model), token_ids(3, 60, seed=7)
    assert relative(logits(made, ids), logits(model, ids)) < FLOAT32
    biased = donor.get("family") == "qwen2" or "attention_bias" in donor
    assert all((layer.self_attn.q_proj.bias is not None) == biased for layer in made.model.layers)
    if biased:
        for layer in made.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.bias.data.zero_()
        assert relative(logits(made, ids), logits(model, ids)) > 1e-3


def test_an_output_bias_comes_along() -> None:
    model = portable(attention_bias=True)
    config = copy.deepcopy(model.config)
    config.attention_output_bias = True
    biased = type(model)(config).eval()
    added = {
        f"model.layers.{index}.self_attn.o_proj.bias": torch.full((96,), 0.1 + index) for index in range(2)
    }
    biased.load_state_dict(model.state_dict() | added, strict=True)
    ids = token_ids(2, 20)
    assert relative(logits(served(biased), ids), logits(biased, ids)) < FLOAT32
    assert relative(logits(biased, ids), logits(model, ids)) > 1e-3


@pytest.mark.parametrize("donor", ["llama3", "yarn", "wide", "qwen2"])
def test_the_rotary_key_turns_with_the_donors_frequencies(donor: str) -> None:
    model = portable(**DONORS[donor])
    made = served(model)
    inv_freq, scaling = model.model.rotary_emb.inv_freq, model.model.rotary_emb.attention_scaling
    assert torch.equal(made.model.rotary_emb.inv_freq, inv_freq)
    assert made.model.rotary_emb.attention_scaling == scaling
    pairs = torch.zeros(1, 1, 9, 64)
    pairs[..., 0::2] = 1.0
    embeddings = made.model.rotary_emb(pairs, torch.arange(9)[None])
    for index, layer in enumerate(made.model.layers):
        frequencies = layer.self_attn.rope_frequencies
        assert frequencies == model.config.layer_frequencies(index)
        assert len(frequencies) == 32
        cos, sin = (table[:, None, :, frequencies] for table in embeddings)
        turned = torch.view_as_complex(rotated(pairs, cos, sin).unflatten(-1, (-1, 2)))[0, 0]
        angles = torch.arange(9.0)[:, None] * inv_freq[frequencies]
        torch.testing.assert_close(turned, scaling * torch.polar(torch.ones(9, 32), angles))


@pytest.mark.parametrize(
    ("s", "eps"), [(1.0, EPS), (2.0**-20, 2.0**-20), (2.0**-10, 1.0), (1.0, EPS_FLOAT16)]
)
def test_the_norm_is_the_identity(s: float, eps: float) -> None:
    norm = LatentRMSNorm(16, eps)
    norm.weight.data.fill_(norm_weight(s, eps))
    x = torch.randn(7, 16)
    limit = x.square().mean(-1).max().item() / (2 * norm_weight(s, eps) ** 2)
    assert relative(norm(x * s), x) <= limit + 2e-7  # and float32's rounding
    model = portable()
    assert (
        relative(logits(served(model, s, eps), token_ids(2, 30)), logits(model, token_ids(2, 30))) < FLOAT32
    )


def test_ordinary_latents_pass_the_norm_as_they_are() -> None:
    norm, x = LatentRMSNorm(64, EPS), torch.randn(7, 64)
    norm.weight.data.fill_(norm_weight(1.0, EPS))
    assert torch.equal(norm(x), x)
    for dtype, eps in ((torch.bfloat16, EPS), (torch.float16, EPS_FLOAT16)):
        narrow = LatentRMSNorm(64, eps).to(dtype)
        narrow.weight.data.fill_(norm_weight(1.0, eps))
        assert torch.equal(narrow(x.to(dtype)), x.to(dtype))


def test_a_real_norm_would_show() -> None:
    model = portable()
    made = served(model)
    for layer in made.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-6
        layer.self_attn.kv_a_layernorm.weight.data.fill_(1.0)
    assert relative(logits(made, token_ids(2, 30)), logits(model, token_ids(2, 30))) > 1e-2


def test_nothing_but_the_norm_and_zeros_is_new() -> None:
    attention = portable(family="qwen2").model.layers[0].self_attn
    tensors = attention.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    made = served_tensors(tensors, ServedShape(4, 48, 64, 128))
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert set(made) - set(before) == {"kv_a_layernorm.weight"}
    for name in set(before) - {"kv_b_proj.weight", "o_proj.weight"}:
        assert torch.equal(made[name], before[name])
    up = made["kv_b_proj.weight"].unflatten(0, (4, -1))
    assert torch.equal(up[:, :128].flatten(0, 1), before["kv_b_proj.weight"])
    assert up.shape[1] == 64 + 128
    assert not up[:, 128:].any()
    scaled = served_tensors(tensors, ServedShape(4, 48, 64, 64), s=2.0**-4)
    for kind in ("weight", "bias"):  # of the latent's rows both, of the rotary key's neither
        name = f"kv_a_proj_with_mqa.{kind}"
        assert torch.equal(scaled[name][:48] * 16, before[name][:48])
        assert torch.equal(scaled[name][48:], before[name][48:])
    assert torch.equal(scaled["o_proj.weight"], before["o_proj.weight"])


@pytest.mark.parametrize(("s", "eps"), [(0.3, EPS), (1.0, 1e-6), (0.0, 1.0), (1.0, 2.0), (-1.0, 1.0)])
def test_factors_that_round_are_refused(s: float, eps: float) -> None:
    with pytest.raises(ExportError, match="are no powers of two and four, and the latent would be rounded"):
        norm_weight(s, eps)


def test_a_float16_that_is_too_narrow() -> None:
    tensors = {"kv_b_proj.weight": torch.zeros(8, 4).half(), "o_proj.weight": torch.zeros(4, 4).half()}
    with pytest.raises(
        CheckpointError, match=r"kv_a_layernorm\.weight reaches 1\.31e\+05 and float16 ends at"
    ):
        served_tensors(tensors, ServedShape(1, 4, 4, 4), eps=2.0**34)


@pytest.mark.parametrize(
    ("widths", "padded"),
    [((64, 64, 64), 128), ((128, 64, 128), 128), ((192, 64, 192), 256), ((16, 8, 16), 16)],
)
def test_values_are_as_wide_as_a_kernel_wants(widths: tuple[int, int, int], padded: int) -> None:
    assert padded_value(*widths) == padded


@pytest.mark.parametrize("sizes", [[1] * 12, [7] + [1] * 5, [5, 4, 3]], ids=["single", "prefill", "chunks"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_reading_is_uncached_reading(pair: tuple[Any, Any], sizes: list[int], kind: str) -> None:
    (model, made), ids = pair, token_ids(3, 12)
    static = kind == "static"
    cache = StaticCache(made.config, max_cache_len=20) if static else DynamicCache(config=made.config)
    assert relative(in_chunks(made, ids, cache, sizes), logits(model, ids)) < FLOAT32
    if not static:
        assert cache_storage(cache) == (3 * 12 * 2 * (48 + 64) * 4, 3 * 12 * 2 * (48 + 64))
    for layer in cache.layers:
        assert (layer.keys.shape[1], layer.keys.shape[3]) == (1, 48)
        assert (layer.values.shape[1], layer.values.shape[3]) == (1, 64)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padding(pair: tuple[Any, Any], kind: str) -> None:
    made, ids, pad = pair[1], token_ids(3, 12), [0, 3, 7]
    mask = torch.tensor([[0] * n + [1] * (12 - n) for n in pad])
    cache = StaticCache(made.config, max_cache_len=16) if kind == "static" else DynamicCache()
    padded = in_chunks(made, ids * mask, cache, [9, 1, 1, 1], attention_mask=mask)
    for row, n in enumerate(pad):
        assert relative(padded[row, n:], logits(made, ids[row : row + 1, n:])[0]) < FLOAT32


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
)
def test_generation_with_the_cache_is_generation_without(
    pair: tuple[Any, Any], options: dict[str, Any]
) -> None:
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    inputs = {"input_ids": token_ids(2, 9) * mask + (1 - mask), "attention_mask": mask}
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    expected = pair[0].generate(**inputs, **settings, **beams, use_cache=False)
    assert torch.equal(pair[1].generate(**inputs, **settings, **options, disable_compile=True), expected)


def test_eager_is_sdpa_and_records_weights(pair: tuple[Any, Any]) -> None:
    made, ids = copy.deepcopy(pair[1]), token_ids(2, 12)
    expected = logits(made, ids)
    made.set_attn_implementation("eager")
    with torch.no_grad():
        found = made(input_ids=ids, use_cache=False, output_attentions=True)
    assert relative(found.logits, expected) < FLOAT32
    assert [tuple(w.shape) for w in found.attentions] == [(2, 4, 12, 12)] * 2


def test_gradients_reach_every_parameter(pair: tuple[Any, Any]) -> None:
    made, ids = copy.deepcopy(pair[1]).train().requires_grad_(True), token_ids(2, 16)
    made(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_lose_what_rounding_loses(dtype: torch.dtype) -> None:
    model, ids = portable(family="qwen2"), token_ids(3, 40)
    eps = EPS if dtype == torch.bfloat16 else EPS_FLOAT16
    expected = logits(model, ids)
    made = served(model, eps=eps).to(dtype)
    assert relative(logits(made, ids).float(), expected) < 2 * relative(
        logits(model.to(dtype), ids).float(), expected
    )


def test_a_save_and_a_load_are_the_same_bits(pair: tuple[Any, Any], tmp_path: Path) -> None:
    made, ids = pair[1], token_ids(2, 20)
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(made, ids))
    [found, written] = [model.config.to_dict() for model in (loaded, made)]
    assert {key: found[key] for key in written if key != "_name_or_path"} == {
        key: written[key] for key in written if key != "_name_or_path"
    }


def test_the_classes_are_known_by_their_type(pair: tuple[Any, Any]) -> None:
    from mhconvert.convert.methods.mla.served import register

    register()
    register()
    model = AutoModelForCausalLM.from_config(pair[1].config)
    assert type(model).__name__ == "MLAServedQwen2ForCausalLM"
    assert pair[1].config.model_type == "mla_served_qwen2"
    plan = latent_tp_plan({"layers.*.self_attn.k_proj": "colwise", "layers.*.mlp.up_proj": "colwise"})
    assert {name.split(".")[-1] for name in plan} == {"q_proj", "kv_b_proj", "o_proj", "up_proj"}
    with pytest.raises(ValueError, match=r"config\.json lacks rope_frequencies"):
        MLAServedLlamaConfig().layer_frequencies(0)
    assert MLAServedLlamaConfig().qk_head_dim is None


def test_heads_may_be_divided_among_devices(pair: tuple[Any, Any]) -> None:
    """Two halves of the heads, as tensor parallelism makes them, add up to the layer."""
    whole = pair[1].model.layers[0].self_attn
    x, embeddings = torch.randn(2, 7, 96), (torch.rand(1, 7, 64), torch.rand(1, 7, 64))
    parts = torch.zeros(2, 7, 96)
    with torch.no_grad():
        for half in range(2):
            part = copy.deepcopy(whole)
            for projection in (part.q_proj, part.kv_b_proj):
                for name, tensor in list(projection.named_parameters()):
                    setattr(projection, name, torch.nn.Parameter(tensor.chunk(2)[half]))
            part.o_proj.weight = torch.nn.Parameter(part.o_proj.weight.chunk(2, dim=1)[half])
            parts += part(x, embeddings)[0]
        assert relative(parts, whole(x, embeddings)[0]) < FLOAT32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_in_latent": True},
            "kv_b_proj reads the rotary key beside the latent (convert with --profile p",
        ),
        ({"kv_lora_rank": [46, 48]}, "layers differ in kv_lora_rank [46, 48] or qk_rope_head_dim [64]"),
        (
            {"rope_frequencies": [[1], [1, 2]]},
            "layers differ in kv_lora_rank [48] or qk_rope_head_dim [2, 4]",
        ),
        (
            {"qk_nope_head_dim": [64, 48]},
            "qk_nope_head_dim is not head_dim in every layer (convert with --pr",
        ),
        ({"qk_norm": "head"}, "its keys are divided by their RMS, which is cached beside latent"),
        ({"attention_softcap": 30.0}, "its scores pass through a softcap of 30.0, which engines leave out"),
        ({"sliding_window": 8}, "a window of 8 tokens, which engines leave out"),
    ],
)
def test_what_it_cannot_hold_is_refused(changes: dict[str, Any], reason: str) -> None:
    config = portable().config
    assert refusal(config) is None
    for name, value in changes.items():
        setattr(config, name, value)
    assert str(refusal(config)).startswith(reason)


def test_other_frequencies_in_every_layer_are_held() -> None:
    model = portable(settings=MLASettings(kv_lora_rank=48, qk_rope_head_dim=64, profile="portable"))
    config = copy.deepcopy(model.config)
    config.rope_frequencies = [[31 - n for n in range(32)], [n // 2 for n in range(32)]]
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    ids = token_ids(2, 30)
    assert relative(logits(served(other), ids), logits(other, ids)) < FLOAT32
