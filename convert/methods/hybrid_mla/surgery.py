"""One layer's attention as the start of a linear mixer: its projections at the mixer's places, the rest neutral. Pure.

Linear attention is a sum of values, weighted by products of queries and keys without RoPE and softmax; a linear mixer
is that with decay, so that the donor's maps are a start (arXiv 2408.15237), not a result.

Shapes: H query heads, G KV heads, d head_dim, D hidden_size; float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mla.coded_method import DonorAttention

NEUTRAL_GATE = 1.2785  # whose SiLU is 1
SHORTEST, LONGEST = (
    1.0,
    64.0,
)  # tokens after which a head's state has decayed to 1/e: the first and the last head
WRITTEN = -1.5  # logit of the part of a token that Gated DeltaNet writes into its state
SMALL = 0.2  # RMS of what the convolution gives, at which its SiLU is nearly linear; norms undo the scale
RIDGE = 1e-3  # of the mean square of what the output map reads
SPREAD = 0.1  # standard deviation of what a token adds to the logits of its gates
TINY = 1e-12
DAMPING = 1e-4  # of the mean square of an input's elements


@dataclass(frozen=True)
class HeadMaps:
    """A donor's projections, one for each query head: q, k, v (H, d, D), o (D, H d), its bias (D,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    o_bias: Tensor


def constant_reader(inputs: Tensor) -> Tensor:
    """u (D,) for which u · x is nearest to 1 over inputs (N, L, D): a mixer's maps have no biases, and hidden states
    have a part that is the same for all tokens."""
    rows = inputs.flatten(0, -2).double()
    moment = rows.mT @ rows / len(rows)
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    return torch.linalg.solve(moment, rows.mean(0))


def head_maps(donor: DonorAttention, heads: int, kv_heads: int, reads_one: Tensor) -> HeadMaps:
    """The donor's projections, K and V repeated for the query heads that share them, biases as maps of `reads_one`.

    The gain of a QK-norm multiplies its rows: it divides by an RMS, which a mixer that norms its queries and keys, or
    its output, does anew.
    """
    (q, k, v), norm = (
        (weight + torch.outer(bias, reads_one) for weight, bias in (donor.q, donor.k, donor.v)),
        donor.norm,
    )
    if norm is not None:
        q, k = q * norm.q.flatten()[:, None], k * norm.k.flatten()[:, None]

    def repeated(x: Tensor, count: int) -> Tensor:
        return x.unflatten(0, (count, -1)).repeat_interleave(heads // count, dim=0)

    return HeadMaps(repeated(q, heads), repeated(k, kv_heads), repeated(v, kv_heads), *donor.o)


def decay_times(heads: int) -> Tensor:
    """(H,) tokens, equally spaced in the logarithm."""
    return torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), heads, dtype=torch.float64)


def gate_rows(count: int, inputs: Tensor) -> Tensor:
    """(count, D), whose products with inputs (N, L, D) have the standard deviation SPREAD, in random directions."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, inputs.shape[-1], generator=generator, dtype=torch.float64)
    return rows * SPREAD / inputs.double().square().sum(-1).mean().sqrt()


def inverse_softplus(x: Tensor) -> Tensor:
    return x + (-torch.expm1(-x)).log()


def gated_deltanet_tensors(
    maps: HeadMaps, reads_one: Tensor, gates: Tensor, taps: Tensor
) -> dict[str, Tensor]:
    """The state dict of transformers' Gated DeltaNet with H heads of queries, keys and values.

    Args:
        gates: (2 H, D), for each head a row for the logit b of how much a token is written, and one for a, which adds
            to its decay.
        taps: of the convolution over queries, keys and values.
    """
    heads, width, _ = maps.q.shape
    z = (NEUTRAL_GATE * reads_one).expand(heads, width, -1)
    times, gates = decay_times(heads), gates.clone()
    gates[::2] += WRITTEN * reads_one
    return {
        "in_proj_qkvz.weight": torch.cat((maps.q, maps.k, maps.v, z), dim=1).flatten(0, 1),  # by heads
        "in_proj_ba.weight": gates,
        "conv1d.weight": taps,
        "dt_bias": inverse_softplus(torch.ones_like(times)),
        "A_log": -times.log(),
        "norm.weight": torch.ones(width, dtype=torch.float64),
        **_output(maps),
    }


def mamba2_tensors(maps: HeadMaps, reads_one: Tensor, gates: Tensor, taps: Tensor) -> dict[str, Tensor]:
    """The state dict of transformers' Mamba2 mixer with H groups: x ← V, B ← K, C ← Q, out ← O (arXiv 2505.17272).

    Args:
        gates: (H, D), rows for the step dt.
        taps: of the convolution over x, B and C.
    """
    heads, width, _ = maps.q.shape
    z = (NEUTRAL_GATE * reads_one).expand(heads * width, -1)
    x, b, c = (each.flatten(0, 1) for each in (maps.v, maps.k, maps.q))
    times = decay_times(heads)
    return {
        "in_proj.weight": torch.cat((z, x, b, c, gates)),
        "conv1d.weight": taps,
        "dt_bias": inverse_softplus(1 / (math.e * times)),
        "A_log": torch.ones_like(times),  # what is 0 would hardly be trained
        "D": torch.full_like(times, SPREAD),
        "norm.weight": torch.ones(heads * width, dtype=torch.float64),
        **_output(maps),
    }


def _output(maps: HeadMaps) -> dict[str, Tensor]:
    return {"out_proj.weight": maps.o, "out_proj.bias": maps.o_bias}


def linear_taps(parts: Sequence[Tensor], inputs: Tensor, kernel: int) -> Tensor:
    """(channels, 1, kernel), a causal convolution that reads the own token alone, and makes each part small.

    Args:
        parts: maps (H, d, D) whose products with inputs (N, L, D) it reads, one after another.
    """
    rows = inputs.flatten(0, -2).double()
    own = []
    for part in parts:
        size = (rows @ part.flatten(0, 1).mT).square().mean().sqrt()
        own.append((SMALL / size.clamp_min(TINY)).expand(part.shape[0] * part.shape[1]))
    weight = torch.zeros(sum(map(len, own)), 1, kernel, dtype=torch.float64)
    weight[:, 0, -1] = torch.cat(own)
    return weight


def output_map(read: Tensor, targets: Tensor) -> Tensor:
    """(D, n), the linear map of what an output map reads (N, L, n) that is nearest to targets (N, L, D)."""
    x, y = (each.flatten(0, -2).double() for each in (read, targets))
    moment = x.mT @ x
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    return torch.linalg.solve(moment, x.mT @ y).mT
