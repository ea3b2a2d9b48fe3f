"""A hybrid in use: caches in pieces, padding, batches, and what a state cannot do, which is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from mhconvert.convert.bare_process.child import cache_storage, filled_cache
from mhconvert.convert.methods.hybrid_mla.states import state_bytes
from mhconvert.convert.methods.mla.modeling_hybrid import MixerStates, own_tokens
from mhconvert.heal.student import choose_trained
from tests.convert.conversions import logits, token_ids

from .hybrids import MIXERS, hybrid

NOISE = 2e-4  # float32 through three layers whose weights are large, relative to logits of about ten


@pytest.fixture(scope="module", params=MIXERS)
def model(request: pytest.FixtureRequest) -> Any:
    """Layers 0 and 2 are linear: the first and the last, where caches are most often looked at."""
    return hybrid(request.param, [0, 2])[1]


def caches(model: Any) -> list[Cache]:
    return [DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=112)]


@torch.no_grad()
def test_pieces_give_what_the_whole_gives(model: Any) -> None:
    """One token at a time is the mixers' recurrence, several are their scan."""
    ids = token_ids(2, 100, seed=5)  # none of whose codes lies so near to a rounding that noise tips it over
    whole = logits(model, ids)
    for cache in caches(model):
        parts, begin = [], 0
        for length in (33, 1, 1, 7, 58):
            parts.append(
                model(input_ids=ids[:, begin : begin + length], past_key_values=cache, use_cache=True).logits
            )
            begin += length
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=NOISE), type(cache)
        assert int(cache.get_seq_length()) == 100
        assert all(isinstance(cache.layers[index], MixerStates) for index in (0, 2))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: Any) -> None:
    ids = token_ids(2, 40)
    padded = torch.cat((torch.ones(2, 7, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(2, 7, dtype=torch.long), torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 7:]
    assert torch.allclose(found, logits(model, ids), atol=NOISE)


@torch.no_grad()
def test_generate_with_a_cache_is_generate_without(model: Any) -> None:
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # rows of 20 and of 14 tokens
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    both = model.generate(input_ids=ids, attention_mask=mask, **options)
    short = model.generate(input_ids=ids[1:, 6:], attention_mask=mask[1:, 6:], **options)
    assert both[1, 20:].tolist() == short[0, 14:].tolist()
    for more in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        found = [
            model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, **options, **more)
            for cached in (True, False)
        ]
        assert found[0].tolist() == found[1].tolist()


def test_what_a_state_cannot_undo_is_refused(model: Any) -> None:
    ids = token_ids(1, 12)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(input_ids=ids, max_new_tokens=4, prompt_lookup_num_tokens=2, do_sample=False)
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cropping 3 tokens .* keeps one state of all 12 tokens"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="drafting tokens"):
        cache.activate_past_recording()
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="layer 0 keeps a state, and this cache holds keys and values"):
        model(input_ids=ids, past_key_values=foreign, use_cache=True)
    with pytest.raises(ValueError, match="no keys and values"):
        cache.layers[0].update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))


@torch.no_grad()
def test_states_are_selected_repeated_and_emptied(model: Any) -> None:
    ids, cache = token_ids(2, 12), DynamicCache()
    whole = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    following = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
    expected = logits(model, torch.cat((ids.flip(0), ids[:, :1]), dim=1))[:, -1:]
    assert torch.allclose(following, expected, atol=NOISE)
    held = cache.layers[0]
    held.reset()
    assert held.get_seq_length() == 0
    assert not held.has_previous_state[0]
    assert whole.shape[1] == 12


@torch.no_grad()
def test_states_weigh_what_is_said_for_any_length(model: Any) -> None:
    for length in (3, 90):
        cache = DynamicCache()
        model(input_ids=token_ids(1, length), past_key_values=cache, use_cache=True)
        of_states = [cache.layers[index] for index in (0, 2)]
        assert cache_storage(type("", (), {"layers": of_states}))[0] == 2 * state_bytes(4, 8, 4)
    row = model.model.layers[1].self_attn.code.bytes
    for tokens, width in ((64, 2), (200, 4)):
        made = model.generate(
            token_ids(1, 3), max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True
        )
        [(size, elements)] = filled_cache(model, made.past_key_values, [tokens], width)
        assert size == tokens * row + 2 * state_bytes(4, 8, width) == elements * width


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_between_tokens_is_refused_and_behind_them_is_not(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    ids, cache = token_ids(2, 20), DynamicCache()
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    found = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(found[1, :14], logits(model, ids[1:, :14])[0], atol=NOISE)
    longer = torch.cat((mask, mask[:, :1]), dim=1)
    with pytest.raises(ValueError, match="padding between the tokens .* pad on the left"):
        model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="padding between the tokens .* pad on the left"):
        model(input_ids=torch.cat((ids, ids[:, :1]), dim=1), attention_mask=longer)
    with pytest.raises(ValueError, match="padding between the tokens .* pad on the left"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=1)
    model.set_attn_implementation("sdpa")


def test_masks_of_all_kinds_tell_padding() -> None:
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None] & padding.bool()[:, None, None]
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (padding, causal, added):
        found = own_tokens(mask, 4, 0)
        assert found is not None
        assert found.int().tolist() == padding.tolist()
    last = own_tokens(causal[:, :, 2:], 2, 2)
    assert last is not None
    assert last.all()
    assert own_tokens(None, 4, 0) is None
    with pytest.raises(ValueError, match="reads no str mask"):
        own_tokens("flex", 4, 0)


def test_healing_trains_the_mixers() -> None:
    model = choose_trained(hybrid("mamba2", [1])[1], "attention", 4)
    model(input_ids=token_ids(1, 16), use_cache=False).logits.square().mean().backward()
    mixer = {n: p for n, p in model.named_parameters() if ".1.self_attn.mixer." in n}
    assert {name.rsplit(".mixer.", 1)[1] for name in mixer} >= {"A_log", "D", "dt_bias", "in_proj.weight"}
    assert all(p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.values())
