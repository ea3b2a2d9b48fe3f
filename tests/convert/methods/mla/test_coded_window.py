"""Windowed layers of coded latents: a mask's logits with every cache, and a cache that holds the window alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.methods.mla import modeling_coded_mla
from mhconvert.convert.methods.mla.first_tokens import FIRST, WindowRows
from mhconvert.convert.methods.mla.latent_code import row_bytes
from mhconvert.convert.methods.registry import register
from tests.convert.conversions import YARN, donor_model, logits, relative, token_ids
from tests.convert.methods.mla.coded_models import coded

SAME = 2e-5  # fp32 rounding through two layers, relative to the logits
WINDOW = 7


def windowed(model: Any, *windows: int | None) -> Any:
    """`model` with a window in some of its layers."""
    made = copy.deepcopy(model)
    made.config.kv_windows = list(windows)
    for layer, window in zip(made.model.layers, windows, strict=True):
        layer.self_attn.kv_window = window
    return made


def visible(length: int, window: int | None, pad: int = 0) -> Tensor:
    """(L, L), by the definition: which token (column) each token (row) of a text behind `pad` others sees."""
    return torch.tensor(
        [
            [pad <= u <= t and (window is None or t - u < window or u - pad < FIRST) for u in range(length)]
            for t in range(length)
        ]
    )


def masked_logits(model: Any, ids: Tensor, windows: tuple[int | None, ...]) -> Tensor:
    """The logits of `model`, which has no windows, with the mask of each window in its layer."""
    hooks = []
    for layer, window in zip(model.model.layers, windows, strict=True):
        added = torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(~visible(ids.shape[1], window), -1e30)

        def masked(_: Any, args: Any, kwargs: Any, added: Tensor = added) -> Any:
            return args, kwargs | {"attention_mask": added[None, None]}

        hooks.append(layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True))
    found = logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def whole() -> Any:
    return coded(donor_model(), 0.25)


@pytest.fixture(scope="module")
def model(whole: Any) -> Any:
    return windowed(whole, WINDOW, None)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope": YARN, "kv_heads": 4},
        {"family": "qwen3"},
        {"family": "stablelm"},
        {"family": "gemma2", "sliding_window": 80},
    ],
    ids=lambda config: "-".join(map(str, config)) or "llama",
)
@pytest.mark.parametrize("windows", [(WINDOW, None), (None, 5), (WINDOW, WINDOW), (1, 9)])
def test_a_window_is_its_mask(config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    model, ids = coded(donor_model(**config), 0.25), token_ids(2, 40)
    expected = masked_logits(model, ids, windows)
    assert relative(logits(model, ids), expected) > 0.01
    assert relative(logits(windowed(model, *windows), ids), expected) < SAME


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_window_that_nothing_leaves_changes_nothing(whole: Any, implementation: str) -> None:
    model = windowed(whole, 40, 41)
    model.set_attn_implementation(implementation)
    ids = token_ids(2, 40)
    assert relative(logits(model, ids), logits(whole, ids)) < SAME


@pytest.mark.parametrize("windows", [(WINDOW, None), (3, WINDOW)])
def test_every_way_to_read_the_cache_is_one_function(
    whole: Any, windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = windowed(whole, *windows), token_ids(2, 40)
    expected = logits(model, ids)

    def read(size: int, cache: Any) -> Tensor:
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(size, 1)]
        return torch.cat(parts, 1)

    with torch.no_grad():
        for size in (40, 1, 13):
            assert relative(read(size, DynamicCache(config=model.config)), expected) < SAME
        assert relative(read(40, DynamicCache()), expected) < SAME
        for size in (1, 40, 13):
            assert relative(read(size, StaticCache(config=model.config, max_cache_len=48)), expected) < SAME
        monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 5)
        assert relative(read(3, DynamicCache()), expected) < SAME
        monkeypatch.setattr(modeling_coded_mla.CodedLatentAttention, "max_absorbed_tokens", 0)
        assert relative(read(3, DynamicCache()), expected) < SAME


@pytest.mark.parametrize("tokens", [3, WINDOW, 40])
def test_the_cache_holds_the_window(model: Any, tokens: int) -> None:
    cache, counts = DynamicCache(), model.config.kv_code_counts
    with torch.no_grad():
        model(input_ids=token_ids(3, tokens), past_key_values=cache)
        model(input_ids=token_ids(3, 1), past_key_values=cache)
    held = FIRST + min(tokens + 1, WINDOW - 1)
    planned = row_bytes(counts[0]) * held + row_bytes(counts[1]) * (tokens + 1)
    assert cache_storage(cache)[0] == 3 * planned
    assert cache.get_seq_length() == tokens + 1


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("windows", [(WINDOW, None), (3, WINDOW)])
def test_left_padding_is_not_seen(
    whole: Any, windows: tuple[int | None, ...], blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = windowed(whole, *windows)
    if blocks:
        monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 5)
    ids, pads = token_ids(3, 30), [0, 6, 13]
    mask = torch.tensor([[0] * pad + [1] * (30 - pad) for pad in pads])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for sizes in ([30], [25, 1, 1, 1, 1, 1], [9, 21]):
        cache, found, end = DynamicCache(), [], 0
        for size in sizes:
            part, end = slice(end, end + size), end + size
            with torch.no_grad():
                found.append(
                    model(
                        input_ids=ids[:, part],
                        attention_mask=mask[:, :end],
                        position_ids=positions[:, part],
                        past_key_values=cache,
                    ).logits
                )
        for row, pad in enumerate(pads):
            alone = logits(model, ids[row : row + 1, pad:])[0]
            assert relative(torch.cat(found, 1)[row, pad:], alone) < SAME
    plain = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert relative(plain[2, 13:], logits(model, ids[2:, 13:])[0]) < SAME


def test_beams_are_those_without_a_cache(model: Any) -> None:
    ids = token_ids(2, 16)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
    }
    found = [model.generate(input_ids=ids, use_cache=cached, **options).tolist() for cached in (True, False)]
    assert found[0] == found[1]


def test_generation_is_the_same_with_a_static_cache_and_with_drafts(model: Any) -> None:
    ids = token_ids(1, 16)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(input_ids=ids, use_cache=False, **options).tolist()
    assert model.generate(input_ids=ids, **options).tolist() == expected
    assert model.generate(input_ids=ids, cache_implementation="static", **options).tolist() == expected
    assert model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options).tolist() == expected


@pytest.mark.parametrize(("read", "removed"), [(5, 3), (5, 4), (40, 6)])
def test_a_recorded_cache_is_cropped(model: Any, read: int, removed: int) -> None:
    ids, cache = token_ids(2, read), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, : read - removed], past_key_values=cache)
        cache.activate_past_recording()
        model(input_ids=ids[:, read - removed :].flip(1), past_key_values=cache)
        cache.crop(-removed)
        again = model(input_ids=ids[:, read - removed :], past_key_values=cache).logits
    assert relative(again, logits(model, ids)[:, read - removed :]) < SAME


def test_a_window_that_has_dropped_tokens_is_not_cropped(model: Any) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=token_ids(1, 20), past_key_values=cache)
    with pytest.raises(
        ValueError, match="2 tokens cannot be cropped from a cache of 20: .* window of 7 tokens"
    ):
        cache.crop(-2)


def test_gradients_reach_the_first_tokens(model: Any) -> None:
    """Through the codes, as training does: the last token of a windowed layer moves the first tokens' latents."""
    attention = copy.deepcopy(model.model.layers[0].self_attn)
    hidden = torch.randn(1, 30, 64, requires_grad=True)
    embeddings = tuple(torch.ones(1, 30, 16) for _ in "cs")
    attention(hidden, embeddings)[0][0, -1].sum().backward()
    reached = hidden.grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == visible(30, WINDOW)[-1].tolist()


def test_masks_of_another_kind_are_refused(model: Any) -> None:
    attention, embeddings = model.model.layers[0].self_attn, tuple(torch.ones(1, 30, 16) for _ in "cs")
    with pytest.raises(
        ValueError, match="reads no list mask; load the model with attn_implementation='sdpa'"
    ):
        attention(torch.randn(1, 30, 64), embeddings, attention_mask=[1])


def test_a_saved_model_has_its_windows(model: Any, tmp_path: Path) -> None:
    register("mla")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.self_attn.kv_window for layer in loaded.model.layers] == [WINDOW, None]
    ids = token_ids(2, 40)
    assert relative(logits(loaded, ids), logits(model, ids)) < SAME
    cache = DynamicCache()
    with torch.no_grad():
        loaded(input_ids=ids, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [WindowRows, DynamicLayer]
