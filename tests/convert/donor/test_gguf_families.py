"""A GGUF of every family is its source model, and what transformers makes of it where that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mhconvert.convert.donor.donor import open_donor
from tests.donors import make_config, make_gguf, make_model

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    }
}
BASE = {"rope_type": "default", "rope_theta": 5e5}
SCALES: dict[str, Any] = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with wide heads": {"family": "llama", "head_dim": 32},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 96},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    "gemma": {"head_dim": 32, "tied": True},
    "gemma2": {"head_dim": 32, "sliding_window": 12, "query_pre_attn_scalar": 32, "tied": True},
    "gemma3_text": LOCAL_ROPE
    | {"head_dim": 32, "sliding_window": 12, "query_pre_attn_scalar": 32, "layers": 6},
    "phi3": {"rope": {"partial_rotary_factor": 0.5}, "pad_token_id": 1},
    "phi3 with a window": {"family": "phi3", "sliding_window": 12, "pad_token_id": 1},
    "olmo": {},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 12,
        "layers": 4,
        "rope_parameters": dict.fromkeys(LOCAL_ROPE["rope_parameters"], BASE),
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "kv_heads": 4},
    "stablelm": {"rope": {"partial_rotary_factor": 0.25}, "use_qkv_bias": True},
    "stablelm in parallel": {"family": "stablelm", "use_parallel_residual": True},
    "starcoder2": {"use_bias": True},
    "granite": SCALES,
    "granitemoe": SCALES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "arcee": {},
}
# Their loader reads these, given the sizes that it takes from the class instead of the file (head_dim, the width of an
# expert) and apart from what else it does so with (a set of fields). It lacks gemma, mixtral, olmo, olmo2 and granite.
THEIRS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({}, set()),
    "qwen2": ({}, set()),
    "qwen2_moe": ({"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}, set()),
    "qwen3": ({"head_dim": 128}, set()),
    "qwen3_moe": ({"moe_intermediate_size": 768}, set()),
    "gemma2": ({}, {"query_pre_attn_scalar"}),
    "gemma3_text": ({}, {"query_pre_attn_scalar"}),
    "phi3": ({}, {"rope_parameters", "sliding_window"}),
    "stablelm": ({}, set()),
    "starcoder2": ({}, set()),
}
NOT_COMPARED = {"architectures", "dtype", "_name_or_path", "pad_token_id"}
IDS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))


def _settings(name: str, **more: Any) -> dict[str, Any]:
    return {"family": name.split()[0], "tied": False} | FAMILIES[name] | more


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_is_its_source_model(tmp_path: Path, name: str) -> None:
    settings = _settings(name)
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", **settings)))
    source = make_model(make_config(**settings))
    assert donor.config.model_type == {"mistral": "llama"}.get(name, source.config.model_type)
    assert donor.config.architectures == [type(donor.skeleton()).__name__]
    if name != "mistral":
        ours, theirs = donor.config.to_dict(), source.config.to_dict()
        other = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
        assert other <= NOT_COMPARED
    model = donor.model("cpu")
    theirs = source.state_dict()
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(
            weight, theirs[key], rtol=0, atol=1e-6
        )  # a Gemma's norms are stored as 1 + w
    with torch.no_grad():
        assert (model(IDS).logits - source(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_equals_the_loader_of_transformers(tmp_path: Path, name: str, tied: bool) -> None:
    sizes, unread = THEIRS[name]
    tied |= name.startswith("gemma")
    settings = _settings(name, **sizes, tied=tied, heads=2, kv_heads=1)
    file = make_gguf(tmp_path / "tiny.gguf", quantization="Q8_0", **settings)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    donor = open_donor(str(file))
    weights = theirs.state_dict()
    assert set(donor.source.names()) == set(weights) - ({"lm_head.weight"} if tied else set())
    for key in donor.source.names():
        read = donor.source.read(key)
        assert torch.equal(read, weights[key]), key
        assert donor.source.shape(key) == tuple(read.shape)
        assert donor.source.nbytes(key) == read.numel() * 4
    ours, other = _rounded(donor.config), _rounded(theirs.config)
    assert {key for key in ours.keys() & other.keys() if ours[key] != other[key]} <= NOT_COMPARED | unread


def _rounded(config: Any) -> dict[str, Any]:
    """The fields of `config`, numbers as float32, as which a file holds them."""
    fields = config.to_dict().items()
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in fields}
