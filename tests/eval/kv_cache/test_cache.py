"""A cache of codes in transformers: what it weighs, what it reads, and what happens to its batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.errors import MhconvertError
from mhconvert.eval.cache_size import measure_cache
from mhconvert.eval.kv_cache.codes import decode, encode
from mhconvert.eval.kv_cache.formats import ByChannel, ByToken, Fp8
from mhconvert.eval.kv_cache.layer import CodedLayer
from mhconvert.eval.kv_cache.serving import cached_forward, make_cache, serve
from tests.donors import make_config, make_model

DTYPES = ("int8", "int4", "int3", "int2", "fp8")
BITS = {"int8": 9, "int4": 5, "int3": 4, "int2": 3, "fp8": 8}  # an element, with its share of step and zero
WINDOWS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture
def ids(generator: torch.Generator) -> Tensor:
    return torch.randint(2, 320, (2, 100), generator=generator)


def logits(model: Any, ids: Tensor, cache: Any, size: int, forward: Any = None) -> Tensor:
    """The logits of `ids`, `size` tokens a call."""
    call = forward or model
    parts = [
        call(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(size, dim=1)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_the_bytes_are_those_of_the_formula(dtype: str, head_dim: int) -> None:
    model = make_model(make_config(heads=2, kv_heads=2, hidden=64, head_dim=head_dim, layers=3))
    cost = measure_cache(model, dtype=dtype)
    assert cost.tokens == 64
    assert cost.bytes_per_token == 3 * 2 * 2 * head_dim * BITS[dtype] / 8
    exact = measure_cache(model).elements_per_token
    assert cost.elements_per_token / exact == BITS[dtype] / 16


def test_unfinished_groups_are_weighed_as_they_are() -> None:
    """Of 40 tokens 32 keys are coded and 8 are not; all values are."""
    config = make_config(heads=2, kv_heads=1, hidden=64, layers=1)
    cache = make_cache(config, "int4")
    cache.update(torch.randn(1, 1, 40, 32), torch.randn(1, 1, 40, 32), 0)
    assert cache_storage(cache)[0] == (32 * 32 + 40 * 32) * 5 / 8 + 8 * 32 * 4
    assert cache.get_seq_length() == 40


def test_keys_are_coded_by_channel_and_values_by_token(generator: torch.Generator) -> None:
    keys, values = (torch.randn(2, 3, 64, 48, generator=generator) for _ in range(2))
    read_keys, read_values = CodedLayer(ByChannel(3), ByToken(3)).update(keys, values)
    expected = decode(encode(keys.mT, 3), 3, 64, torch.float32).mT
    assert torch.equal(read_keys[:, :, :32], expected[:, :, :32])
    assert torch.equal(read_keys[:, :, 32:], keys[:, :, 32:])  # the newest group
    assert torch.equal(read_values, decode(encode(values, 3), 3, 48, torch.float32))  # groups of 32 and of 16


def test_fp8_is_e4m3_with_scale_1(generator: torch.Generator) -> None:
    keys = torch.randn(1, 1, 4, 8, generator=generator) * 100
    keys[0, 0, 0, :3] = torch.tensor([1e4, -1e4, math.nan])
    keys[0, 0, 1, :2] = torch.tensor([math.inf, -math.inf])
    read, _ = CodedLayer(Fp8(), Fp8()).update(keys, keys)
    assert read[0, 0, 0, :2].tolist() == [448, -448]
    assert bool(read[0, 0, 0, 2].isnan())
    assert bool(read[0, 0, 1, :2].isnan().all())
    assert torch.equal(read[0, 0, 2:], keys[0, 0, 2:].clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", WINDOWS)
@torch.inference_mode()
def test_at_once_in_chunks_and_step_by_step_are_one(family: str, dtype: str, ids: Tensor) -> None:
    """Chunks of any size. In float64, as in float32 sums differ in their last places, and a code may fall elsewhere."""
    config = make_config(family=family, **WINDOWS[family])
    model = make_model(config).double()
    forward = cached_forward(model, dtype)
    at_once = forward(input_ids=ids).logits
    steps = logits(
        model, ids, make_cache(config, dtype), 1
    )  # without the pass in groups: that is how one serves
    chunks = logits(model, ids, make_cache(config, dtype), 37, forward)
    for other in (steps, chunks):
        torch.testing.assert_close(other, at_once, atol=1e-5, rtol=0)  # gemma2's softmax is float32
    last = forward(input_ids=ids, logits_to_keep=40).logits
    torch.testing.assert_close(last, at_once[:, -40:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_no_token_depends_on_those_behind_it(ids: Tensor) -> None:
    forward = cached_forward(make_model(make_config()), "int2")
    changed = ids.clone()
    changed[:, 70:] = 5
    assert torch.equal(forward(input_ids=ids).logits[:, :70], forward(input_ids=changed).logits[:, :70])


@torch.inference_mode()
def test_more_bits_are_nearer_to_the_exact_cache(ids: Tensor) -> None:
    model = make_model(make_config())
    exact = model(ids).logits
    errors = [
        (cached_forward(model, dtype)(input_ids=ids).logits - exact).square().mean() for dtype in DTYPES[:4]
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 100  # steps are 17 times as long, errors 289 times as large


def test_a_window_drops_whole_groups(ids: Tensor) -> None:
    config = make_config(family="mistral", sliding_window=40)
    cache = make_cache(config, "int4")
    with torch.inference_mode():
        logits(make_model(config), ids, cache, 1)
    assert (cache.get_seq_length(), cache.get_mask_sizes(1, 0)) == (100, (100 - 32 + 1, 32))
    assert cache.is_sliding == [True, True]
    with pytest.raises(ValueError, match="5 tokens cannot be removed from a coded cache of 68: 32 keys"):
        cache.crop(-5)


@torch.inference_mode()
def test_a_crop_leaves_no_trace_or_is_refused(ids: Tensor) -> None:
    config = make_config()
    model = make_model(config)
    cache, other = make_cache(config, "int3"), make_cache(config, "int3")
    logits(model, ids, cache, 1)
    logits(model, ids[:, :97], other, 1)
    cache.crop(-3)
    assert cache.get_seq_length() == 97
    for layer, same in zip(cache.layers, other.layers, strict=True):
        assert all(map(torch.equal, layer.stored_keys, same.stored_keys))
        assert all(map(torch.equal, layer.stored_values, same.stored_values))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="only the last 1 are not coded yet"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="minus the tokens to remove"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert logits(model, ids, cache, 100).shape[1] == 100


@pytest.mark.parametrize("dtype", ["int3", "fp8"])
@torch.inference_mode()
def test_rows_of_the_batch_are_kept_apart(dtype: str, ids: Tensor) -> None:
    config = make_config()
    model = make_model(config)
    cache = make_cache(config, dtype)
    logits(model, ids, cache, 50)
    cache.batch_repeat_interleave(2)  # 0 0 1 1
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))  # 1 0 0 1
    cache.batch_select_indices(torch.tensor([0, 2]))  # 1 0
    swapped = make_cache(config, dtype)
    logits(model, ids.flip(0), swapped, 50)
    following = torch.tensor([[7], [7]])
    found, expected = (model(input_ids=following, past_key_values=each).logits for each in (cache, swapped))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # float32, two layers


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_beams_and_left_padding(dtype: str, ids: Tensor) -> None:
    """int8 moves no greedy token of this model; with padding, groups begin elsewhere, which is as little."""
    model = make_model(make_config())
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": None,
    }
    row, padded = ids[:1, :50], torch.cat((torch.ones(1, 9, dtype=torch.long), ids[:1, :50]), dim=1)
    batch = torch.cat((padded, ids[1:, :59]))
    mask = (torch.arange(59) >= torch.tensor([[9], [0]])).long()
    with torch.inference_mode():
        exact = model.generate(batch, attention_mask=mask, num_beams=3, **options)
        serve(model, dtype)
        found = model.generate(batch, attention_mask=mask, num_beams=3, **options)
        alone = model(input_ids=row).logits[:, -1]
        places = (mask[:1].cumsum(-1) - 1).clamp_min(0)
        left = model(input_ids=padded, attention_mask=mask[:1], position_ids=places).logits[:, -1]
        own = model(input_ids=row).logits[:, -1]
    assert found.shape == exact.shape
    assert torch.equal(alone, own)
    same = (found == exact).float().mean()
    assert same > 0.9 if dtype == "int8" else same > 0.5
    assert (left - alone).abs().max() < (0.1 if dtype == "int8" else 1e-4)


@torch.inference_mode()
def test_a_nan_in_one_key_is_seen(ids: Tensor) -> None:
    for keys in (ByChannel(4), Fp8()):
        layer = CodedLayer(keys, ByToken(4))
        states = torch.randn(1, 1, 64, 32)
        states[0, 0, 5, 2] = math.nan
        read, _ = layer.update(states, torch.randn(1, 1, 64, 32))
        assert bool(read[0, 0, 5, 2].isnan())
        assert bool(read[0, 0, :, 3].isfinite().all())


def test_what_parts_cannot_give_is_refused(ids: Tensor) -> None:
    forward = cached_forward(make_model(make_config()), "int4")
    with pytest.raises(MhconvertError, match="in groups of 32 tokens, without labels"):
        forward(input_ids=ids, labels=ids)
    assert forward(input_ids=ids[:, :20], labels=ids[:, :20]).loss > 0  # one group


def test_bfloat16_states_come_back_as_bfloat16() -> None:
    states = torch.randn(1, 2, 70, 32).bfloat16()
    for dtype in DTYPES:
        config = make_config(heads=2, kv_heads=2, hidden=64, layers=1)
        read = make_cache(config, dtype).update(states, states, 0)
        assert {each.dtype for each in read} == {torch.bfloat16}
        assert {each.shape for each in read} == {states.shape}
