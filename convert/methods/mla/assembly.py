"""The tensors of a `LatentAttention` from what the surgery returns: biases, and a donor's QK-norm.

The surgery takes queries and keys to be linear in the hidden state. A QK-norm divides them by their RMS, which differs
from token to token. So the surgery is given weights divided by the RMS of the mean energy (`at_mean_scale`), and the
module multiplies each token's scores by its own 1 / RMS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attention.projections import QKNorm
from ...attention.weights import AttentionWeights, LayerStatistics
from ...families.facts import AttentionFacts
from .surgery import LatentWeights

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class NormedWeights:
    """A donor's projections for the surgery; without a QK-norm both are the same.

    Attributes:
        plain: the donor's own.
        linear: q and k times the norm's gain and divided by their RMS over the calibration text.
        gain: the norm's weights.
        key_scale: (G,), the RMS by which each head's keys were divided.
    """

    plain: AttentionWeights
    linear: AttentionWeights
    gain: QKNorm | None = None
    key_scale: Tensor | None = None


def at_mean_scale(
    weights: AttentionWeights, norm: QKNorm | None, facts: AttentionFacts, statistics: LayerStatistics
) -> NormedWeights:
    """`weights` for the surgery: with a QK-norm, heads have a mean square of 1 before its gain, on average."""
    if norm is None:
        return NormedWeights(weights, weights)

    def mean_rms(rows: Tensor, moment: Tensor) -> Tensor:
        """(heads,): the RMS of each head's projection; of all heads together for a norm of the width."""
        energy = torch.einsum("hdD,DE,hdE->h", rows, moment, rows) / facts.head_dim
        energy = energy.mean().expand(len(rows)) if facts.qk_norm == "width" else energy
        return energy.clamp_min(TINY).sqrt()

    q_scale = mean_rms(weights.q, statistics.query_moment)
    k_scale = mean_rms(weights.k, statistics.key_moment)
    linear = replace(
        weights,
        q=weights.q * (norm.q / q_scale[:, None]).unsqueeze(-1),
        k=weights.k * (norm.k / k_scale[:, None]).unsqueeze(-1),
    )
    return NormedWeights(weights, linear, norm, k_scale)


def module_tensors(
    latent: LatentWeights, weights: NormedWeights, facts: AttentionFacts, donor_bias: Tensor
) -> dict[str, Tensor]:
    """The state dict of a `LatentAttention`, float64.

    Args:
        latent: what the surgery returned for `weights.linear`.
        weights: the donor's projections.
        donor_bias: (D,), of the donor's o_proj.
    """
    tensors = {
        "kv_b_proj.weight": latent.kv_b_proj,
        "o_proj.weight": latent.o_proj,
        "o_proj.bias": latent.o_bias + donor_bias,
    }
    readers = {"q_proj": latent.q_proj, "kv_a_proj_with_mqa": latent.kv_a_proj_with_mqa}
    if weights.gain is not None:
        assert weights.key_scale is not None
        # Scores are query_map · gain · (q / rms q) · (k / key_scale) · (key_scale / rms k): the last factor's
        # numerator joins the query, 1 / rms k is cached.
        maps = latent.query_map * weights.gain.q[:, None, :]
        tensors["q_b_proj.weight"] = maps * weights.key_scale[weights.plain.group].view(-1, 1, 1)
        readers |= {"q_proj": weights.plain.q.flatten(0, 1), "k_proj": weights.plain.k.flatten(0, 1)}
    for name, matrix in readers.items():
        if facts.input_bias:
            tensors[f"{name}.bias"] = matrix[:, -1]
            matrix = matrix[:, :-1]
        tensors[f"{name}.weight"] = matrix
    return tensors
