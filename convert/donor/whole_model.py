"""A donor's whole model in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..storage.safetensors_reader import TensorSource
from .tensor_layout import LM_HEAD, TensorLayout, meta_model


def whole_model(
    source: TensorSource,
    layout: TensorLayout,
    rotary: nn.Module,
    generation: GenerationConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Any:
    """The model of `layout` with the weights of `source` in `dtype`, in eval mode without gradients.

    rotary: its rotary embedding, on `device`.
    """
    model, family = meta_model(layout.config), layout.family
    weights = {name: source.read(name).to(device=device, dtype=dtype) for name in layout.shapes}
    weights.setdefault(LM_HEAD, weights[layout.output])
    model.load_state_dict(weights, strict=True, assign=True)
    base = getattr(model, family.base)
    setattr(base, family.rotary, rotary)
    for layer in getattr(
        base, family.layers
    ):  # converted attention holds the rotary embedding beside the model
        if getattr(layer.self_attn, "slot_embeddings", None) is not None:
            layer.self_attn.slot_embeddings.rotary = rotary
    if hasattr(base, "rotary_embs"):  # of granite_swa, for each base of its layers' RoPE
        made = (type(rotary)(each.config).to(device) for each in base.rotary_embs)
        base.rotary_embs = nn.ModuleList(made)
    for module in model.modules():  # buffers that are derived from the config
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    model.tie_weights()
    model.generation_config = generation
    return model.eval().requires_grad_(False)


def final_logits(config: Any, logits: Tensor) -> Tensor:
    """The logits after the scaling of Granite and the softcap of Gemma 2, if the config has them."""
    scaling = getattr(config, "logits_scaling", None)
    logits = logits / scaling if scaling else logits  # without a copy: they are as large as a layer
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
