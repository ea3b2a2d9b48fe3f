"""A converted model beside its donor, small enough to train in a test."""

from __future__ import annotations

from typing import Any

import torch

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.heal.packed_rows import Rows
from tests.convert.conversions import converted, donor_model


def pair(budget: float = 0.4, seed: int = 0) -> tuple[Any, Any]:
    """(student, teacher) with random weights, in float32."""
    donor = donor_model(seed=seed)
    return converted(donor, MLASettings(kv_budget=budget, kv_bits="16")), donor


def rows(count: int, length: int, seed: int = 0, cut: tuple[int, ...] = ()) -> Rows:
    """Random tokens; a new text begins at each place in `cut`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 320, (count, length), generator=generator, dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32)
    for place in cut:
        positions[place:] = torch.arange(length - place, dtype=torch.int32)
    return Rows(ids, positions.expand(count, -1).clone())
