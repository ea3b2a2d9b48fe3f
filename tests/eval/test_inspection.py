"""Inspection: geometry and cache arithmetic from configs alone, and why a method does not apply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhconvert import api
from mhconvert.convert.methods.mla.coded_class import coded_config
from mhconvert.convert.methods.mla.configuration_mla import MLALlamaConfig
from mhconvert.errors import MhconvertError
from mhconvert.eval.inspection import attention, cache_elements
from tests.donors import make_config, make_donor


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kind"), [(4, 4, "multi-head"), (4, 2, "grouped-query"), (4, 1, "multi-query")]
)
def test_donor_geometry(heads: int, kv_heads: int, kind: str) -> None:
    config = make_config(heads=heads, kv_heads=kv_heads, hidden=64, layers=3)
    assert cache_elements(config) == [2 * kv_heads * 16] * 3
    facts = attention(config)
    assert (facts["kind"], facts["head_dim"], facts["num_key_value_heads"]) == (kind, 16, kv_heads)


def test_converted_geometry() -> None:
    config = MLALlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=64,
        kv_lora_rank=[24, 20],
        rope_frequencies=[[0, 1, 2, 3], [0, 2]],
        qk_nope_head_dim=[16, 12],
        v_head_dim=16,
    )
    assert cache_elements(config) == [24 + 8, 20 + 4]
    facts = attention(config)
    assert facts["kv_lora_rank"] == [24, 20]
    assert facts["qk_rope_head_dim"] == [8, 4]
    assert (facts["qk_nope_head_dim"], facts["v_head_dim"]) == ([16, 12], 16)


def test_a_donor(tmp_path: Path) -> None:
    facts = api.inspect(str(make_donor(tmp_path / "whole", layers=2, kv_heads=2)))
    assert facts["kv"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["kv"]["bytes"]["32768"] == 32_768 * 512
    assert facts["methods"]["mla"]["applies"]
    assert facts["methods"]["mla"]["kv_bytes_per_token"] <= 256
    assert facts["methods"]["mla"]["output_bytes"] > 0
    assert facts["methods"]["moh"]["kv_bytes_per_token"] == 512
    json.dumps(facts)


def test_what_a_run_would_need_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a window shorter than a calibration row nor a file where the output would go."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short-mla").touch()
    donor = make_donor(tmp_path / "short", max_position_embeddings=64)
    assert api.inspect(str(donor))["methods"]["mla"]["applies"]


def test_a_converted_config_that_is_not_whole(tmp_path: Path) -> None:
    MLALlamaConfig(num_hidden_layers=2, rope_frequencies=[[0], [0]]).save_pretrained(tmp_path)
    with pytest.raises(MhconvertError, match=r"is not whole: config\.json lacks kv_lora_rank"):
        api.inspect(str(tmp_path))
    MLALlamaConfig(num_hidden_layers=2, rope_frequencies=[[0], [0]], kv_lora_rank=4).save_pretrained(tmp_path)
    with pytest.raises(MhconvertError, match=r"is not whole: config\.json lacks qk_nope_head_dim"):
        api.inspect(str(tmp_path))


def test_refused_by_name(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "windowed", sliding_window=64)
    mla = api.inspect(str(donor))["methods"]["mla"]
    assert not mla["applies"]
    assert "sliding_window=64" in mla["reason"]


def test_coded_latents_count_their_bytes() -> None:
    config = coded_config(make_config())
    config.kv_code_counts, config.dtype = [[0, 0, 0, 0, 4, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], torch.bfloat16
    assert cache_elements(config) == [1.5, 1.0]
    facts = attention(config)
    assert facts["kind"] == "coded latents (MLA)"
    assert (facts["kv_lora_rank"], facts["kv_code_bytes"]) == ([4, 1], [3, 2])
