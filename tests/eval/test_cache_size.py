"""The cache is weighed on the object that `generate` returns; the weight is what the geometry promises."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.eval.cache_size import measure_cache
from tests.donors import make_config, make_model


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_equals_geometry(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    model = make_model(make_config(heads=heads, kv_heads=kv_heads, hidden=64, layers=3)).to(dtype)
    cost = measure_cache(model, prompt_tokens=10, new_tokens=5)
    assert cost.tokens == 14
    assert cost.elements_per_token == 3 * 2 * kv_heads * (64 // heads)
    assert cost.bytes_per_token == cost.elements_per_token * dtype.itemsize


def test_a_static_cache_weighs_its_whole_buffer() -> None:
    model = make_model(make_config(layers=2))
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.inference_mode():
        model(input_ids=torch.arange(5)[None], past_key_values=cache)
    size, elements = cache_storage(cache)
    assert elements == 32 * 2 * 2 * 2 * 16
    assert size == 4 * elements


def test_a_slice_costs_the_buffer_behind_it() -> None:
    model = make_model(make_config(layers=1))
    with torch.inference_mode():
        cache = model(input_ids=torch.arange(8)[None], use_cache=True).past_key_values
    held, _ = cache_storage(cache)
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]
    assert cache_storage(cache)[0] == held


@pytest.mark.parametrize(("window", "coded_tokens"), [(8, 32), (40, 64)])
def test_caches_behind_a_window_are_weighed_behind_as_many_tokens(window: int, coded_tokens: int) -> None:
    """A plain cache holds the window; a coded one drops whole groups of 32 that lie before it."""
    model = make_model(make_config(family="mistral", sliding_window=window, layers=2))
    plain, coded = measure_cache(model), measure_cache(model, dtype="fp8")
    assert plain.tokens == coded.tokens == 64
    each = 2 * 2 * 2 * 16  # elements of a token
    assert (plain.elements, coded.elements) == (window * each, coded_tokens * each / 2)
