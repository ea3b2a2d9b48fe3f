"""config.json as families publish it, at tiny width and in bfloat16: converted, reloaded, generated from, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.conftest import Cli
from tests.donors import TEXT, make_model, make_tokenizer, stored_weights, write_weights

COMMON = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
WIDTHS = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 1,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "pad_token_id": 0,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "pad_token_id": 1,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "pad_token_id": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "stablelm": {
        "architectures": ["StableLmForCausalLM"],
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "model_type": "stablelm",
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
    },
    "starcoder2": {
        "architectures": ["Starcoder2ForCausalLM"],
        "activation_function": "gelu",
        "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "sliding_window": 4096,
        "use_bias": True,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


def published(folder: Path, family: str) -> Path:
    """A donor of random weights in two shards, whose config.json has the keys that `family` is published with."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(COMMON | WIDTHS | PUBLISHED[family]))
    model = make_model(AutoConfig.from_pretrained(folder, trust_remote_code=False)).to(torch.bfloat16)
    write_weights(folder, stored_weights(model), shards=2)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_family_as_it_is_published(here: Cli, tmp_path: Path, family: str) -> None:
    donor, out, text = published(tmp_path / "donor", family), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT * 12)
    words = ("--to", "mla", "--kv-budget", "0.25", "--effort", "quick", "--calibration", text)
    made = here(donor, *words, "--calibration-tokens", 512, "--sequence-length", 64, "-o", out, "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["verified"]["largest_logit_difference"] < 1e-3 * report["verified"]["logit_spread"]
    assert report["kv_bytes_per_token"] == {
        "donor": cached_bytes(donor),
        "converted": cached_bytes(donor) / 4,
    }
    code = json.loads((out / "config.json").read_text())["auto_map"].values()
    assert all((out / f"{name.split('.')[0]}.py").is_file() for name in code)
    assert here("generate", out, "The river", "--max-new-tokens", 4).returncode == 0
    told = here("eval", out, "--text", text, "--sequences", 2, "--sequence-length", 64, "--json")
    assert told.returncode == 0, told.stderr
    donors, converted = json.loads(told.stdout)["texts"][0]["models"]
    assert converted["kl"] < 0.6
    assert converted["perplexity"] == pytest.approx(donors["perplexity"], rel=0.5)
    refused = here("export", out, "--to", "auto")
    assert refused.returncode == 1
    assert "caches coded latents" in refused.stderr


def cached_bytes(donor: Path) -> int:
    """What the donor caches for a token, in bfloat16."""
    config = json.loads((donor / "config.json").read_text())
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return 2 * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * width
