"""The cache is weighed on the object that `generate` returns; the weight is what the geometry promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, StaticCache

from mhconvert import api
from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.methods.hybrid_mla.method import hybrid_class
from mhconvert.convert.methods.swa.method import SWA
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.open_model import open_model
from mhconvert.eval.cache_size import elements_per_token, lengths, measure_cache
from mhconvert.eval.page.verdict import cache_length, cache_shares, verdict
from mhconvert.eval.settings import EvalSettings
from tests.convert.conversions import assembled, converted_layers, token_ids
from tests.donors import make_config, make_donor, make_model, make_tokenizer

WINDOWS: dict[str, dict[str, Any]] = {family: {"sliding_window": 16} for family in ("mistral", "gemma2")}


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


@pytest.mark.parametrize("dtype", ["auto", "int4", "int3", "fp8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_filled_cache_is_the_one_that_generate_leaves(family: str, dtype: str) -> None:
    """gemma2 has a window in every second layer, mistral in all."""
    model = make_model(make_config(family=family, layers=2, **WINDOWS.get(family, {})))
    at = [9, 31, 72]
    left = [measure_cache(model, prompt_tokens=n - 3, dtype=dtype).elements_per_token for n in at]
    assert elements_per_token(model, at, dtype) == left


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_no_cache_is_made_to_be_weighed(dtype: str) -> None:
    [per_token] = elements_per_token(make_model(make_config(layers=2)), [1 << 40], dtype)
    assert per_token == 2 * 2 * 2 * 16 / (1 if dtype == "auto" else 2)


def test_the_length_is_that_of_the_plan_or_of_windows_alone(tmp_path: Path) -> None:
    plain, planned = make_donor(tmp_path / "plain"), make_donor(tmp_path / "planned")
    windowed = make_donor(tmp_path / "windowed", family="gemma2", sliding_window=8)
    record: dict[str, Any] = {"cache_context": 96}
    (planned / "mhconvert.json").write_text(json.dumps(record))
    opened = [open_model(str(each), device="cpu") for each in (plain, planned, windowed)]
    reads = opened[2].config.max_position_embeddings
    assert lengths(opened[:1]) == []
    assert lengths(opened[:2]) == lengths(opened) == [12, 96]
    assert lengths([opened[0], opened[2]]) == [reads // 8, reads]
    hybrid = SimpleNamespace(folder=plain, config=hybrid_class(LlamaConfig).config_class(linear_layers=[1]))
    reads = hybrid.config.max_position_embeddings
    assert lengths([hybrid]) == [reads // 8, reads]  # type: ignore[list-item]
    (planned / "mhconvert.json").write_text(json.dumps({"cache_context": "96"}))
    assert lengths(opened[:2]) == []


def test_windows_save_in_an_evaluation_what_they_save_at_the_context(tmp_path: Path) -> None:
    folder, window, context = make_donor(tmp_path / "donor", layers=4), 8, 128
    donor = make_model(make_config(layers=4))
    method = SWA(donor.config, SWASettings(window=window, context=context, full_layers=[1]), "quick")
    assembled(donor, method, converted_layers(donor, method, token_ids(1, 16))).save_pretrained(
        tmp_path / "swa"
    )
    make_tokenizer().save_pretrained(tmp_path / "swa")
    record = {"recipe": {"method": "swa", "model": str(folder)}, "cache_context": context}
    (tmp_path / "swa" / "mhconvert.json").write_text(json.dumps(record))
    text = tmp_path / "text.txt"
    text.write_text("Water boils at 100 degrees at sea level. " * 20, encoding="utf-8")
    settings = EvalSettings(text=(str(text),), sequences=1, sequence_length=16)
    result = api.evaluate(str(tmp_path / "swa"), settings, device="cpu")
    kept = (context + 3 * window) / (4 * context)
    assert cache_shares(result) == [1, kept]
    assert cache_length(result, 1) == "at 128 tokens, 62.5 % at 16"
    assert f"keeps {100 * kept:.3g} % of the KV cache at 128 tokens, 62.5 % at 16" in verdict(result)[0]
    coded = api.evaluate(
        str(tmp_path / "swa"), dataclasses.replace(settings, kv_cache_dtype="fp8"), device="cpu"
    )
    assert coded["cache"][0] == result["cache"][0]
    assert cache_shares(coded)[1] == (context + 3 * 32) / (
        8 * context
    )  # whole groups of 32 behind the window
