"""Tiny donors with coded latents, made in memory, with sensitivities from one backward pass of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.convert.calibration.token_rows import random_ids
from mhconvert.convert.families.facts import attention_facts
from mhconvert.convert.methods.layer_sensitivity import FIRST_TOKENS, LayerMoments, LayerSensitivity
from mhconvert.convert.methods.mla.coded_method import CodedMLA
from mhconvert.convert.methods.mla.settings import MLASettings
from tests.convert.conversions import assembled, converted_layers, token_ids


def key_value_modules(attention: Any) -> list[Any]:
    """The modules that make keys and values; one makes the queries too in some families, a norm the keys in others."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    return [attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj, attention.v_proj]


def token_rows(x: Tensor, kv_heads: int) -> Tensor:
    """(1, L, width) of what such a module gives: that, or heads (1, L, G, d) or (1, G, L, d)."""
    heads_first = x.dim() == 4 and x.shape[1] == kv_heads
    return (x.transpose(1, 2) if heads_first else x).flatten(2)


def whole_model_sensitivities(donor: Any, ids: Tensor, seed: int = 0) -> list[LayerSensitivity]:
    """What the pass over the layers measures, from the whole model at once."""
    written: list[list[Tensor]] = [[] for _ in donor.model.layers]
    facts = attention_facts(donor.config)
    key_value, fused = (
        2 * facts.kv_heads * facts.head_dim,
        hasattr(donor.model.layers[0].self_attn, "qkv_proj"),
    )

    def keep(index: int) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            output.requires_grad_() if output.is_leaf else output.retain_grad()
            written[index].append(output)

        return hook

    hooks = [
        module.register_forward_hook(keep(index))
        for index, layer in enumerate(donor.model.layers)
        for module in key_value_modules(layer.self_attn)
    ]
    generator = torch.Generator().manual_seed(seed)
    for row in ids:
        likely = donor(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        ids_drawn = random_ids(likely.detach().exp(), generator)
        likely.gather(-1, ids_drawn).sum().backward()
    for hook in hooks:
        hook.remove()

    def joined(outputs: list[Tensor], positions: slice = slice(FIRST_TOKENS, None)) -> Tensor:
        pairs = [outputs] if fused else [outputs[::2], outputs[1::2]]
        rows = [torch.cat([each[0] for each in parts], dim=-1) for parts in zip(*pairs, strict=True)]
        return torch.cat([row[positions, -key_value:] for row in rows]).double()

    found = []
    for outputs in written:
        values, gradients = (
            [token_rows(each, facts.kv_heads) for each in tensors]
            for tensors in ([o.detach() for o in outputs], [o.grad for o in outputs])  # type: ignore[misc]
        )
        moments = LayerMoments(key_value)
        moments.begin(joined(values, slice(1)))
        moments.add(joined(values), joined(gradients))
        found.append(moments.sensitivity())
    return found


def coded(donor: Any, budget: float) -> Any:
    """`donor` with coded latents at `budget`, fp32 and in eval mode."""
    ids = token_ids(8, 32)
    method = CodedMLA(donor.config, MLASettings(kv_budget=budget, kv_bits="auto"), "quick")
    method.share_out(whole_model_sensitivities(donor, ids))
    return assembled(donor, method, converted_layers(donor, method, ids))
