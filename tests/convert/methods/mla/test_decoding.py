"""Every way of reading the same tokens gives the same logits: caches, chunks, padding, batches, beams, kernels.

Tolerance: another order of float32 sums in two layers, 1e-5 of the logits.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from mhconvert.convert.methods.mla import slot_embeddings
from mhconvert.convert.methods.mla.slot_embeddings import SlotEmbeddings
from tests.convert.conversions import LLAMA3, converted, donor_model, logits, relative, token_ids

FLOAT32 = 1e-5


@pytest.fixture(
    scope="module",
    params=[(32, {"kv_heads": 2}), (0, {"kv_heads": 2}), (2, {"kv_heads": 1, "rope": LLAMA3})],
    ids=["absorbed", "expanded", "mqa"],
)
def model(request: pytest.FixtureRequest) -> Any:
    """Chunks of at most 32, 0 or 2 tokens meet the cache in absorbed form."""
    most, config = request.param
    model = converted(donor_model(**config))
    for layer in model.model.layers:
        layer.self_attn.max_absorbed_tokens = most
    return model


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, cache: Cache, sizes: list[int], **inputs: Any) -> Tensor:
    """Logits of all tokens, `sizes` of them at a time; an attention_mask (N, T) grows along."""
    parts, seen, mask = [], 0, inputs.pop("attention_mask", None)
    for chunk in ids.split(sizes, dim=1):
        seen += chunk.shape[1]
        known = {} if mask is None else {"attention_mask": mask[:, :seen]}
        parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True, **known, **inputs).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "sizes", [[1] * 12, [7] + [1] * 5, [5, 4, 3], [1, 8, 3]], ids=["single", "prefill", "chunks", "mixed"]
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_reading_is_uncached_reading(model: Any, sizes: list[int], kind: str) -> None:
    ids = token_ids(3, 12)
    cache: Cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    assert relative(in_chunks(model, ids, cache, sizes), logits(model, ids)) < FLOAT32
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padding(model: Any, kind: str) -> None:
    ids, pad = token_ids(3, 12), [0, 3, 7]
    mask = torch.tensor([[0] * n + [1] * (12 - n) for n in pad])
    cache: Cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    padded = in_chunks(model, ids * mask, cache, [9, 1, 1, 1], attention_mask=mask)
    for row, n in enumerate(pad):
        assert relative(padded[row, n:], logits(model, ids[row : row + 1, n:])[0]) < FLOAT32


@pytest.mark.parametrize(
    "sizes", [[20, 20], [20] + [1] * 20, [7, 13, 1, 19]], ids=["halves", "single", "mixed"]
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_hole_in_the_mask(model: Any, kind: str, sizes: list[int]) -> None:
    """A row that ended early and goes on: positions are numbered without the hole, in the cache as outside it."""
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 14:20] = 0
    kept, positions = mask[1].bool(), (mask.cumsum(1) - 1).clamp_min(0)
    cache: Cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=48)
    parts, seen = [], 0
    with torch.no_grad():
        for chunk in ids.split(sizes, dim=1):
            first, seen = seen, seen + chunk.shape[1]
            known = {"attention_mask": mask[:, :seen], "position_ids": positions[:, first:seen]}
            parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True, **known).logits)
    found = torch.cat(parts, dim=1)
    assert relative(found[1, kept], logits(model, ids[1:, kept])[0]) < FLOAT32
    assert relative(found[:1], logits(model, ids[:1])) < FLOAT32


def test_slots_follow_a_layer_to_its_device(model: Any) -> None:
    """The rotary module may live elsewhere, as accelerate's hooks leave it: its tables are brought along."""
    slots = model.model.layers[0].self_attn.slot_embeddings
    table = slots.embed(4, torch.zeros(1))
    rotary, slots.rotary = slots.rotary, lambda *_: tuple(t.to("meta") for t in table)
    try:
        moved = slots.embed(4, torch.zeros(1, device="meta"))
    finally:
        slots.rotary = rotary
    assert all(t.device.type == "meta" for t in moved)


@pytest.mark.parametrize(("most", "chosen_once"), [(1 << 16, True), (23, False)])
def test_few_components_are_chosen_once(
    model: Any, monkeypatch: pytest.MonkeyPatch, most: int, chosen_once: bool
) -> None:
    monkeypatch.setattr(slot_embeddings, "KEPT", most)
    slots, chosen = SlotEmbeddings(model.model.rotary_emb, None), [3, 0, 3]
    for dtype in (torch.float32, torch.float64):
        like = torch.zeros(1, dtype=dtype)
        for length in (5, 7, 20):
            found = slots.components(length, like, chosen)
            assert found.dtype == dtype
            for part, whole in zip(found.unbind(-1), slots.embed(length, like), strict=True):
                assert torch.equal(part, whole[..., chosen])
        again = slots.components(19, like, chosen)
        assert (again.data_ptr() == found.data_ptr()) == chosen_once


def test_a_table_of_a_run_without_gradients_serves_one_with_them() -> None:
    model, ids = converted(donor_model()), token_ids(1, 9)
    with torch.inference_mode():
        cache = DynamicCache()
        model(input_ids=ids[:, :8], past_key_values=cache)
        expected = model(input_ids=ids[:, 8:], past_key_values=cache).logits.clone()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache)
    found = model(input_ids=ids[:, 8:], past_key_values=cache).logits
    found.sum().backward()
    assert relative(found.detach(), expected) < FLOAT32
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_cache_that_quantises_is_refused(model: Any) -> None:
    class Quantised(DynamicLayer):
        def _quantize(self, tensor: Tensor) -> Tensor:
            return tensor

    cache = Cache(layers=[Quantised() for _ in range(2)])
    with pytest.raises(ValueError, match="layer 0 caches one row .* --kv-cache-dtype"):
        model(input_ids=token_ids(1, 5), past_key_values=cache)


def test_a_batch_is_its_rows(model: Any) -> None:
    ids = token_ids(4, 15)
    rows = torch.cat([logits(model, row.unsqueeze(0)) for row in ids])
    assert relative(logits(model, ids), rows) < FLOAT32


@pytest.mark.parametrize("sizes", [[12], [8, 1, 1, 2]], ids=["prefill", "cached"])
def test_eager_is_sdpa(model: Any, sizes: list[int]) -> None:
    ids = token_ids(2, 12)
    mask = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
    found = []
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        assert model.model.layers[0].self_attn.config._attn_implementation == kind
        found.append(in_chunks(model, ids, DynamicCache(), sizes, attention_mask=mask))
    assert relative(found[0][mask.bool()], found[1][mask.bool()]) < FLOAT32


def test_reordered_beams(model: Any) -> None:
    ids, order = token_ids(3, 10), torch.tensor([2, 0, 0])
    cache = DynamicCache()
    in_chunks(model, ids[:, :9], cache, [9])
    cache.reorder_cache(order)
    reordered = torch.cat((ids[order, :9], ids[:, 9:]), dim=1)
    with torch.no_grad():
        step = model(input_ids=ids[:, 9:], past_key_values=cache).logits
    assert relative(step, logits(model, reordered)[:, 9:]) < FLOAT32


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_the_cache_is_generation_without(model: Any, options: dict[str, Any]) -> None:
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    inputs = {"input_ids": token_ids(2, 9) * mask + (1 - mask), "attention_mask": mask}
    plain = {k: v for k, v in options.items() if k != "cache_implementation"}
    expected = model.generate(**inputs, **settings, **plain, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, **options, disable_compile=True), expected)


class Adapted(torch.nn.Linear):
    """An adapter around a projection, as peft makes them: its weight is not all that it does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["class", "hook"])
def test_a_projection_that_is_more_than_its_weight_is_called(kind: str) -> None:
    """Decoding with an unmerged adapter on kv_b_proj is not decoding without it."""
    model, ids = converted(donor_model()), token_ids(2, 9)
    for layer in model.model.layers:
        up = layer.self_attn.kv_b_proj
        if kind == "class":
            up.__class__ = Adapted
        else:
            up.register_forward_hook(lambda _, inputs, output: output + inputs[0].mean(-1, keepdim=True))
    assert relative(in_chunks(model, ids, DynamicCache(), [6, 1, 1, 1]), logits(model, ids)) < FLOAT32


def test_heads_may_be_divided_among_devices() -> None:
    """Two halves of the heads, as tensor parallelism makes them, add up to the layer."""
    whole = converted(donor_model(kv_heads=4)).model.layers[0].self_attn
    x, embeddings = torch.randn(2, 7, 64), (torch.rand(1, 7, 16), torch.rand(1, 7, 16))
    parts = torch.zeros(2, 7, 64)
    with torch.no_grad():
        for half in range(2):
            part = copy.deepcopy(whole)
            for name in ("q_proj", "kv_b_proj"):
                weight = getattr(part, name).weight
                getattr(part, name).weight = torch.nn.Parameter(weight.chunk(2)[half])
            part.o_proj.weight = torch.nn.Parameter(part.o_proj.weight.chunk(2, dim=1)[half])
            part.o_proj.bias = None if half else part.o_proj.bias
            parts += part(x, embeddings)[0]
        assert relative(parts, whole(x, embeddings)[0]) < FLOAT32
