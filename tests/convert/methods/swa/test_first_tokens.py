"""Windows that keep the first tokens: the donor below the window, its mask beyond, and a cache that is as planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mhconvert.convert.bare_process.child import cache_storage, filled_cache
from mhconvert.convert.methods.swa.first_tokens import FIRST, WindowRows
from mhconvert.convert.methods.swa.method import SWA
from mhconvert.convert.methods.swa.settings import SWASettings
from tests.convert.conversions import (
    assembled,
    converted_layers,
    donor_model,
    logits,
    relative,
    rotary_of,
    token_ids,
)
from tests.convert.methods.mla.test_families_exact import VARIANTS, by_steps, donor_of

WINDOW, LENGTH = 5, 24
EXACT, SAME = 1e-6, 1e-5  # of the logits' norm; float32, two layers
WITHOUT_OWN = {"sliding_window": None}
ALL_WINDOWED = ("mistral", "phi3-partial", "starcoder2")  # where there would be nothing to window


def visible(length: int) -> Tensor:
    """(L, L), by the definition: which token (column) each token (row) sees."""
    return torch.tensor(
        [[u <= t and (t - u < WINDOW or u < FIRST) for u in range(length)] for t in range(length)]
    )


def masked_logits(donor: Any, ids: Tensor, layers: list[int]) -> Tensor:
    """The donor's logits when its `layers` get the mask of `visible`."""
    mask = torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(~visible(ids.shape[1]), -1e30)[None, None]

    def masked(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask}

    hooks = [
        donor.model.layers[index].self_attn.register_forward_pre_hook(masked, with_kwargs=True)
        for index in layers
    ]
    found = logits(donor, ids)
    for hook in hooks:
        hook.remove()
    return found


def method_for(donor: Any, full_layers: tuple[int, ...] = ()) -> SWA:
    settings = SWASettings(window=WINDOW, context=LENGTH, sinks="first", full_layers=list(full_layers))
    return SWA(donor.config, settings, "quick")


def converted(donor: Any, full_layers: tuple[int, ...] = ()) -> Any:
    method = method_for(donor, full_layers)
    return assembled(donor, method, converted_layers(donor, method, token_ids(1, LENGTH)))


@pytest.fixture(scope="module")
def model() -> Any:
    return converted(donor_model(), (1,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_its_donor_with_a_mask(variant: str) -> None:
    donor, ids = donor_of(variant, **(WITHOUT_OWN if variant in ALL_WINDOWED else {})), token_ids(2, LENGTH)
    method = method_for(donor)
    layers = converted_layers(donor, method, ids)
    model = assembled(donor, method, layers)
    assert model.config.model_type == f"swa_{donor.config.model_type}"
    near = ids[:, : WINDOW + FIRST]
    assert relative(logits(model, near), logits(donor, near)) < EXACT
    whole, expected = logits(model, ids), masked_logits(donor, ids, method.plan.free)
    assert relative(whole, expected) < EXACT
    assert relative(logits(donor, ids), expected) > 1e-3
    for prefill in (1, WINDOW + FIRST + 2):
        assert relative(by_steps(model, ids, prefill), whole) < SAME
    planned = method.facts.kv_elements * sum(method.plan.held(method.windows, LENGTH))
    made = model.generate(near[:1, :2], max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    assert filled_cache(model, made.past_key_values, [LENGTH]) == [(4 * planned, planned)]
    assert method.kv_elements() == -(-planned // LENGTH)

    index, seen = method.plan.free[0], []
    hook = model.model.layers[index].self_attn.register_forward_hook(
        lambda _, args, kwargs, output: seen.extend(
            (args[0] if args else kwargs["hidden_states"], output[0])
        ),
        with_kwargs=True,
    )
    logits(model, ids)
    hook.remove()
    found = layers[index](seen[0], position_embeddings=rotary_of(donor, LENGTH, index), attention_mask=None)[
        0
    ]
    assert relative(found, seen[1]) < SAME  # the layer of the pass


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_way_to_read_the_cache_is_one_function(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    ids = token_ids(2, LENGTH)
    expected = masked_logits(donor_model(), ids, [0])
    for size in (1, 7, LENGTH):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
            with torch.no_grad():
                parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(size, 1)]
            assert relative(torch.cat(parts, 1), expected) < SAME


@pytest.mark.parametrize("tokens", [3, WINDOW, LENGTH])
def test_the_cache_holds_what_is_planned(model: Any, tokens: int) -> None:
    ids, method = token_ids(3, tokens), method_for(donor_model(), (1,))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        model(input_ids=ids[:, -1:], past_key_values=cache)
    assert type(cache.layers[0]) is WindowRows
    assert cache_storage(cache)[1] == 3 * method.facts.kv_elements * sum(
        method.plan.held(method.windows, tokens)
    )


@pytest.mark.parametrize("sizes", [[LENGTH], [9, 1, 14], [LENGTH - 2, 1, 1]])
def test_left_padding_is_not_seen(model: Any, sizes: list[int]) -> None:
    ids, pads = token_ids(3, LENGTH), [0, 6, 11]
    mask = torch.tensor([[0] * pad + [1] * (LENGTH - pad) for pad in pads])
    positions, cache, found, end = (mask.cumsum(-1) - 1).clamp_min(0), DynamicCache(), [], 0
    for size in sizes:
        part, end = slice(end, end + size), end + size
        inputs = {
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, part],
            "past_key_values": cache,
        }
        with torch.no_grad():
            found.append(model(input_ids=ids[:, part], **inputs).logits)
    for row, pad in enumerate(pads):
        alone = logits(model, ids[row : row + 1, pad:])[0]
        assert relative(torch.cat(found, 1)[row, pad:], alone) < SAME


def test_generation_is_the_same_by_every_cache_and_with_drafts_and_beams(model: Any) -> None:
    ids = token_ids(2, 12)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, use_cache=False, **options).tolist()
    assert model.generate(input_ids=ids, **options).tolist() == expected
    assert model.generate(input_ids=ids, cache_implementation="static", **options).tolist() == expected
    beams = [
        model.generate(input_ids=ids, use_cache=c, num_beams=3, **options).tolist() for c in (False, True)
    ]
    assert beams[0] == beams[1]
    one = {name: value[:1] if name == "attention_mask" else value for name, value in options.items()}
    drafted = model.generate(input_ids=ids[:1], prompt_lookup_num_tokens=3, **one).tolist()
    assert drafted == model.generate(input_ids=ids[:1], use_cache=False, **one).tolist()


def test_a_recorded_cache_is_cropped_and_another_refuses(model: Any) -> None:
    ids, cache, removed = token_ids(2, LENGTH), DynamicCache(), 6
    with torch.no_grad():
        model(input_ids=ids[:, :-removed], past_key_values=cache)
        with pytest.raises(ValueError, match="2 tokens cannot be cropped from a cache of 18: .* window of 5"):
            cache.crop(-2)
        cache.activate_past_recording()
        model(input_ids=ids[:, -removed:].flip(1), past_key_values=cache)
        cache.crop(-removed)
        again = model(input_ids=ids[:, -removed:], past_key_values=cache).logits
    assert relative(again, logits(model, ids)[:, -removed:]) < SAME


def test_gradients_reach_what_is_seen(model: Any) -> None:
    hidden = torch.randn(1, LENGTH, 64, requires_grad=True)
    embeddings = tuple(torch.ones(1, LENGTH, 16) for _ in "cs")
    model.model.layers[0].self_attn(hidden, embeddings)[0][0, -1].sum().backward()
    reached = hidden.grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == visible(LENGTH)[-1].tolist()


def test_masks_of_another_kind_are_refused(model: Any) -> None:
    attention, embeddings = model.model.layers[0].self_attn, tuple(torch.ones(1, 9, 16) for _ in "cs")
    with pytest.raises(
        ValueError, match="reads no list mask; load the model with attn_implementation='sdpa'"
    ):
        attention(torch.randn(1, 9, 64), embeddings, attention_mask=[1])


def test_weights_are_refused_by_name(model: Any) -> None:
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions: layer 0 has a window"):
        model(input_ids=token_ids(1, 8), output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: layer 0 has a window"):
        model(input_ids=token_ids(1, 8))
    model.config.output_attentions = False
    model.set_attn_implementation("sdpa")
