"""Decoupled heads that are the donor's own: every way of saying so gives the donor.

Tolerance: 0.0 where the same products are made in the same order; else another order of float32 sums, 2e-5 of the
logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.methods.dha import modeling_dha, register
from mhconvert.convert.methods.dha.converted_class import decoupled_config
from mhconvert.convert.methods.dha.modeling_dha import HeadGroups, StepRuns
from mhconvert.convert.methods.dha.settings import DHASettings
from tests.convert.conversions import converted, donor_model, logits, relative, token_ids
from tests.convert.methods.mla.test_families_exact import VARIANTS, WINDOW, by_steps, donor_of
from tests.donors import make_config

FLOAT32 = 2e-5
WHOLE = DHASettings(kv_budget=1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_heads_are_the_donor_of_every_family(variant: str) -> None:
    donor = donor_of(variant)
    model, ids = converted(donor, WHOLE), token_ids(2, 40, seed=7)
    expected = logits(donor, ids)
    assert relative(logits(model, ids), expected) < FLOAT32
    assert relative(by_steps(model, ids, 20), expected) < FLOAT32
    sizes = [cache_storage(m(input_ids=ids[:, :8]).past_key_values)[1] for m in (model, donor)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_all_heads_of_a_multi_head_donor_are_the_donor_to_the_bit(seed: int) -> None:
    """Check 1: identity maps, no fusion. No head is changed, so nothing is rounded."""
    donor = donor_model(seed, heads=4, kv_heads=4)
    model, ids = converted(donor, WHOLE), token_ids(3, 24, seed)
    assert torch.equal(logits(model, ids), logits(donor, ids))


def mapped(donor: Any, k_map: list[int], v_map: list[int]) -> Any:
    """A decoupled-head model with the donor's other weights, its maps the same in every layer; attention is random."""
    register()
    config = decoupled_config(donor.config, output_bias=False)
    config.k_head_map, config.v_head_map = [list(k_map)] * 2, [list(v_map)] * 2
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {name: t for name, t in donor.state_dict().items() if ".self_attn." not in name}
    model.load_state_dict(state, strict=False)
    return model


def reordered(model: Any, keys: list[int], values: list[int]) -> Any:
    """The same model with its stored K and V heads in another order, the maps inverted."""
    config = copy.deepcopy(model.config)
    config.k_head_map = [[keys.index(n) for n in layer] for layer in config.k_head_map]
    config.v_head_map = [[values.index(n) for n in layer] for layer in config.v_head_map]
    other = AutoModelForCausalLM.from_config(config).eval()
    state, width = model.state_dict(), model.model.layers[0].self_attn.head_dim
    for name, order in (("k_proj", keys), ("v_proj", values)):
        for full in [n for n in state if f".{name}." in n]:
            heads = state[full].unflatten(0, (-1, width))
            state[full] = heads[order].flatten(0, 1)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize(
    ("k_map", "v_map"),
    [([0, 1, 2, 1], [1, 0, 0, 1]), ([0, 1, 2, 3], [0, 1, 1, 2]), ([0, 0, 1, 1], [0, 1, 0, 1])],
)
def test_stored_heads_may_be_in_any_order(k_map: list[int], v_map: list[int]) -> None:
    """Check 2: permute the stored heads, invert in the maps."""
    model, ids = mapped(donor_model(heads=4, kv_heads=4), k_map, v_map), token_ids(2, 20)
    keys, values = list(range(max(k_map) + 1))[::-1], list(range(max(v_map) + 1))[::-1]
    assert torch.equal(logits(reordered(model, keys, values), ids), logits(model, ids))


def copied(model: Any, donor: Any) -> Any:
    """The multi-head model in which every query head has the K and V head that `model` has it read."""
    stock = type(donor)(copy.deepcopy(donor.config)).eval()
    state, width = model.state_dict(), model.model.layers[0].self_attn.head_dim
    for index, layer in enumerate(model.model.layers):
        for name, groups in (("k_proj", layer.self_attn.keys), ("v_proj", layer.self_attn.values)):
            full = f"model.layers.{index}.self_attn.{name}.weight"
            state[full] = state[full].unflatten(0, (-1, width))[groups.head_map].flatten(0, 1)
    stock.load_state_dict(state)
    return stock


MAPS = [
    ([0, 1, 2, 1], [1, 0, 0, 1]),
    ([0, 0, 1, 1], [0, 0, 1, 1]),
    ([0, 1, 2, 3], [0, 0, 0, 0]),
    ([0, 1, 0, 1], [0, 1, 0, 1]),
    ([1, 0, 2, 0], [0, 1, 2, 2]),
]


@pytest.mark.parametrize(("k_map", "v_map"), MAPS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_maps_are_what_a_multi_head_model_with_copied_heads_computes(
    k_map: list[int], v_map: list[int], implementation: str
) -> None:
    donor = donor_model(heads=4, kv_heads=4)
    model, ids = mapped(donor, k_map, v_map), token_ids(2, 20)
    expected = logits(copied(model, donor), ids)
    model.set_attn_implementation(implementation)
    assert relative(logits(model, ids), expected) < FLOAT32
    assert relative(by_steps(model, ids, 9), expected) < FLOAT32
    assert relative(by_steps(model, ids, 1), expected) < FLOAT32


@torch.no_grad()
def cached(model: Any, cache: Any, ids: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    parts, seen = [], 0
    for chunk in ids.split(sizes, dim=1):
        seen += chunk.shape[1]
        found = model(input_ids=chunk, past_key_values=cache, attention_mask=mask[:, :seen])
        parts.append(found.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("k_map", "v_map"), MAPS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [[9, 1, 1, 1], [4, 3, 5]], ids=["single", "chunks"])
def test_padding_and_caches(k_map: list[int], v_map: list[int], kind: str, sizes: list[int]) -> None:
    """Check 13, and the cache's elements (check 12): K heads and V heads, each head_dim wide, and nothing else."""
    model, ids, pad = mapped(donor_model(heads=4, kv_heads=4), k_map, v_map), token_ids(3, 12), [0, 3, 7]
    mask = torch.tensor([[0] * n + [1] * (12 - n) for n in pad])
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=12)
    found = cached(model, cache, ids * mask, mask, sizes)
    for row, n in enumerate(pad):
        assert relative(found[row, n:], logits(model, ids[row : row + 1, n:])[0]) < FLOAT32
    heads = max(k_map) + 1 + max(v_map) + 1
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert stored == 3 * 12 * 2 * heads * model.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=["beams", "static"]
)
def test_generation_past_a_window_is_generation_without_a_cache(options: dict[str, Any]) -> None:
    donor = donor_model(family="mistral", heads=4, kv_heads=4, sliding_window=WINDOW)
    model = mapped(donor, *MAPS[0])
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    inputs = {"input_ids": token_ids(2, 9) * mask + (1 - mask), "attention_mask": mask}
    plain = {key: value for key, value in options.items() if key != "cache_implementation"}
    expected = model.generate(**inputs, **settings, **plain, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, **options, disable_compile=True), expected)


def test_a_save_and_a_load_are_the_same_bits(tmp_path: Path) -> None:
    model, ids = mapped(donor_model(heads=4, kv_heads=4), *MAPS[0]), token_ids(2, 20)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_cast_keeps_the_frequencies_and_bfloat16_reads_alike() -> None:
    model, ids = mapped(donor_model(heads=4, kv_heads=4), *MAPS[0]), token_ids(1, 16)
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    # 8 bits a number, a few roundings in each of two layers, and a score's share of them in its exponential.
    assert relative(by_steps(model, ids, 6).float(), logits(model, ids).float()) < 0.1


@pytest.mark.parametrize(
    ("k_map", "v_map", "calls"),
    [
        ([0, 0, 1, 1, 2, 2], [0] * 6, 1),
        ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], 2),
        ([0, 0, 0, 0, 1, 1], [0] * 6, 2),  # groups of two sizes
        ([1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0], 1),
    ],
)
def test_a_step_copies_no_cached_head(
    k_map: list[int], v_map: list[int], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that read alike meet their cached heads in few calls of the kernel, on views of the cache."""
    keys, values = HeadGroups(k_map), HeadGroups(v_map)
    query = torch.randn(2, 6, 1, 8)
    key, value = torch.randn(2, keys.count, 9, 8), torch.randn(2, values.count, 9, 8)
    expected = scaled_dot_product_attention(query, keys.expand(key), values.expand(value), scale=0.3)
    read: list[tuple[int, int]] = []

    def recorded(rows: Tensor, k: Tensor, v: Tensor, *mask: Any, **options: Any) -> Tensor:
        read.append((k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()))
        return scaled_dot_product_attention(rows, k, v, *mask, **options)

    monkeypatch.setattr(modeling_dha.F, "scaled_dot_product_attention", recorded)
    found = StepRuns(keys, values).attend(query, key, value, None, 0.3)
    assert relative(found, expected.transpose(1, 2).flatten(2)) < FLOAT32
    assert read == [(key.data_ptr(), value.data_ptr())] * calls


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ([[0, 1, 1, 0]], "1 layers and the model 2"),
        ([[0, 1, 1, 0], [0, 1, 1]], "layer 1: 3 entries for 4 query heads"),
        ([[0, 1, 1, 0], [0, 2, 2, 0]], "layer 1: .* without a gap"),
        ([[0, 1, 1, -1], [0, 1, 1, 0]], "layer 0: .* without a gap"),
    ],
)
@pytest.mark.parametrize("field", ["k_head_map", "v_head_map"])
def test_maps_that_do_not_fit_are_refused_on_load(
    tmp_path: Path, field: str, maps: list[list[int]], said: str
) -> None:
    import json

    register()
    config = decoupled_config(make_config(heads=4, kv_heads=4), output_bias=False)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {field: maps}))
    with pytest.raises(Exception, match=rf"{field}.*{said}"):
        type(config).from_pretrained(tmp_path)


def test_gradients_reach_every_parameter() -> None:
    model, ids = mapped(donor_model(heads=4, kv_heads=4), *MAPS[0]).train(), token_ids(2, 16)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe"])
def test_keys_with_a_norm_stay_and_values_that_repeat_each_other_are_fused_without_loss(variant: str) -> None:
    """The second half of the donor's V heads is a linear map of the first; o_proj can hold the map."""
    donor = donor_of(variant, heads=8, kv_heads=4)
    width, generator = donor.model.layers[0].self_attn.head_dim, torch.Generator().manual_seed(3)
    for layer in donor.model.layers:
        heads = layer.self_attn.v_proj.weight.data.unflatten(0, (4, width))
        heads[2:] = torch.randn(width, width, generator=generator) @ heads[:2]
    model, ids = converted(donor, DHASettings(kv_budget=0.75)), token_ids(2, 40, seed=7)
    expected = logits(donor, ids)
    for before, after in zip(donor.model.layers, model.model.layers, strict=True):
        heads = after.self_attn.keys.count, after.self_attn.values.count
        assert heads == (4, 2)
        assert after.self_attn.keys.head_map == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(after.self_attn.k_proj.weight, before.self_attn.k_proj.weight)
        assert torch.equal(after.self_attn.k_norm.weight, before.self_attn.k_norm.weight)
    assert relative(logits(model, ids), expected) < FLOAT32
    assert relative(by_steps(model, ids, 20), expected) < FLOAT32
