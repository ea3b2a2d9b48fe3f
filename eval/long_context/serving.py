"""Models that read texts longer than they were trained on, in `generate` and in every forward pass."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .attention import IMPLEMENTATION, Reach
from .chunks import Chunks
from .plan import READERS, LongContext
from .window import Window


def serve(model: Any, how: LongContext | None) -> Any:
    """`model`, which reads longer texts from now on; as it is for None. Its config becomes a copy of its own."""
    if how is None:
        return model
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    base = getattr(model, how.family.base)
    if how.kind in READERS:
        reach = Reach(_rule(how, getattr(base, how.family.rotary).inv_freq))
        for layer in getattr(base, how.family.layers):
            reach.attach(layer.self_attn)
        model.set_attn_implementation(IMPLEMENTATION)
    else:
        own.rope_parameters = dict(own.rope_parameters) | _rope(how)
        rotary = type(getattr(base, how.family.rotary))(config=own).to(model.device)
        if how.kind == "dynamic":
            rotary.register_forward_pre_hook(_forget)
        setattr(base, how.family.rotary, rotary)
    return model


def _forget(rotary: Any, _: tuple[Any, ...]) -> None:
    """Make the base that of this pass: transformers' dynamic RoPE keeps that of a longer text read before."""
    rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len


def _rule(how: LongContext, inv_freq: Tensor) -> Chunks | Window:
    if how.kind == "window":
        return Window(how.trained, inv_freq)
    return Chunks(how.trained, how.chunk_size, how.chunks, inv_freq)


def _rope(how: LongContext) -> dict[str, Any]:
    """transformers' own rope type: yarn for the longest text, dynamic by the length of each."""
    if how.kind == "yarn":
        trained = {"original_max_position_embeddings": how.trained}
        return {"rope_type": "yarn", "factor": how.factor} | trained
    return {"rope_type": "dynamic", "factor": 1.0}
