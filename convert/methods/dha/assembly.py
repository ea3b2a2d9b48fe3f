"""The attention module of a converted layer from its tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...attention.projections import rotary_order
from ...families.facts import AttentionFacts
from .modeling_dha import DecoupledHeadAttention
from .observed import Observed
from .surgery import FusedWeights


def assemble(
    fused: FusedWeights, seen: Observed, config: Any, facts: AttentionFacts, index: int, device: torch.device
) -> DecoupledHeadAttention:
    """The attention of layer `index` of a model with `config`: the tensors of `fused` and the donor's norms.

    Returns:
        The module, float32 on `device`, in eval mode.
    """
    norms = copy.deepcopy(seen.norms)
    with torch.device("meta"):
        module = DecoupledHeadAttention(copy.deepcopy(config), index, norms)
    rows = rotary_order(facts).argsort()  # back to the donor's order
    weights = fused.weights
    tensors = {"o_proj.weight": weights.o.flatten(1)}
    if config.attention_output_bias:
        tensors["o_proj.bias"] = fused.o_bias + seen.output_bias
    if norms is not None:
        named = zip(("q_norm", "k_norm"), norms, strict=True)
        tensors |= {f"{name}.{part}": t for name, norm in named for part, t in norm.state_dict().items()}
    readers = {"q_proj": weights.q[:, rows], "k_proj": weights.k[:, rows], "v_proj": weights.v}
    for name, heads in readers.items():
        matrix = heads.flatten(0, 1)
        if facts.input_bias:
            tensors[f"{name}.bias"] = matrix[:, -1]
            matrix = matrix[:, :-1]
        tensors[f"{name}.weight"] = matrix
    state = {name: tensor.to(device, torch.float32).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
