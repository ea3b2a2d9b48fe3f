"""A linear attention that starts from a donor's: the closed form of its layer stage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..layer_fits import UNSEEN
from ..mla.coded_method import DonorAttention
from .surgery import (
    constant_reader,
    gate_rows,
    gated_deltanet_tensors,
    head_maps,
    linear_taps,
    mamba2_tensors,
    output_map,
)

FORM_TOKENS = 16384  # that the output's map is fitted to
ROWS = 4  # that go through a mixer at once


def mixer_layer(
    config: Any,
    donor: DonorAttention | None = None,
    inputs: Tensor | None = None,
    targets: Tensor | None = None,
    device: Any = None,
) -> Any:
    """The linear attention of one layer, float32, in eval mode; without weights where no donor is given.

    Args:
        config: of the converted model.
        inputs, targets: (N, L, D), what the donor's attention reads and returns; the last rows, which judge the
            fit, are not read.
    """
    from ..mla.modeling_hybrid import LinearAttention

    made = copy.copy(config)
    made.dtype = torch.float32
    module: Any = LinearAttention(made, 0)
    if donor is None or inputs is None or targets is None:
        return module
    known = len(inputs) - max(1, len(inputs) // UNSEEN)
    rows = slice(max(1, min(known, FORM_TOKENS // inputs.shape[1])))
    inputs, targets = inputs[rows], targets[rows]
    state = _start(config, donor, inputs)
    wanted = module.mixer.state_dict()
    module.mixer.load_state_dict({n: t.float().contiguous() for n, t in state.items() if n in wanted})
    module = module.to(device).eval().requires_grad_(False)
    out = module.mixer.out_proj
    bias = 0 if out.bias is None else out.bias.cpu()
    out.weight.copy_(output_map(_read_by(module, out, inputs), targets.cpu() - bias))
    return module


def _start(config: Any, donor: DonorAttention, inputs: Tensor) -> dict[str, Tensor]:
    """The mixer's tensors, float64, but for what the output's map will be."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    reads_one = constant_reader(inputs)
    maps = head_maps(donor, heads, kv_heads, reads_one)
    deltanet = config.linear_mixer == "gated-deltanet"
    gates = gate_rows(heads * (2 if deltanet else 1), inputs)
    parts = (maps.q, maps.k, maps.v) if deltanet else (maps.v, maps.k, maps.q)
    taps = linear_taps(parts, inputs, config.linear_conv_kernel)
    return (gated_deltanet_tensors if deltanet else mamba2_tensors)(maps, reads_one, gates, taps)


@torch.no_grad()
def _read_by(module: nn.Module, inner: nn.Module, inputs: Tensor) -> Tensor:
    """What the part `inner` of a module reads when that reads inputs (N, L, D): (N, L, width), on the CPU."""
    found: list[Tensor] = []
    hook = inner.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].cpu()))
    device = next(module.parameters()).device
    for rows in inputs.split(ROWS):
        module(rows.to(device))
    hook.remove()
    return torch.cat(found)
