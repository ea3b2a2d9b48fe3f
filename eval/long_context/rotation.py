"""RoPE of states that have it already: they are turned on, or back, so that they stand at another position."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(states: Tensor, steps: Tensor, inv_freq: Tensor) -> Tensor:
    """`states` (…, d) as if each stood `steps` (…) positions further on; negative steps: nearer to the start.

    inv_freq (r / 2,): radians a position of the r elements that RoPE rotates, which are the first ones, in halves.
    """
    pairs = len(inv_freq)
    angles = steps.unsqueeze(-1).float() * inv_freq.to(states.device).float()
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    real, imaginary, rest = states.tensor_split((pairs, 2 * pairs), dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin, rest), dim=-1)
