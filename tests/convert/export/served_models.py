"""Tiny portable MLA models beside their served form, in memory and as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mhconvert.convert.checkpoint.provenance import write_model_config
from mhconvert.convert.export.mla import own_layer
from mhconvert.convert.export.mla.own_layer import EPS, ServedShape, served_config, served_tensors
from mhconvert.convert.methods.mla.settings import MLASettings
from tests.convert.conversions import converted, donor_model
from tests.donors import make_tokenizer

PORTABLE = MLASettings(kv_lora_rank=48, qk_rope_head_dim=64, profile="portable")
WIDE = {"head_dim": 64, "hidden": 96}


def portable(seed: int = 0, settings: MLASettings = PORTABLE, **config: Any) -> Any:
    """A donor converted with --profile portable."""
    return converted(donor_model(seed, **(WIDE | config)), settings)


def served(model: Any, s: float = 1.0, eps: float = EPS) -> Any:
    """`model` in the served class."""
    config = served_config(model.config, eps)
    made = own_layer.model_class(config)(config).eval()
    shape = ServedShape(
        config.num_attention_heads, config.kv_lora_rank, model.config.v_head_dim, config.v_head_dim
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." not in name}
    for index, layer in enumerate(model.model.layers):
        tensors = served_tensors(layer.self_attn.state_dict(), shape, s=s, eps=eps)
        state |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in tensors.items()}
    made.load_state_dict(state, strict=True)
    return made


def checkpoint(path: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A portable conversion in a folder, with tokenizer and code."""
    model = portable(**config).to(dtype)
    model.save_pretrained(path)
    write_model_config(path, model.config, type(model), dtype)
    make_tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("Tiny test licence\n", encoding="utf-8")
    return path


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
