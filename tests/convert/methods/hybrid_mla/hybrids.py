"""Tiny hybrids, made in memory."""

from __future__ import annotations

from typing import Any

from mhconvert.convert.methods.hybrid_mla.method import HybridMLA
from mhconvert.convert.methods.hybrid_mla.settings import HybridSettings, Mixer
from tests.convert.conversions import assembled, converted_layers, donor_model, token_ids
from tests.convert.methods.mla.coded_models import whole_model_sensitivities

MIXERS: tuple[Mixer, ...] = ("mamba2", "gated-deltanet")


def hybrid(mixer: Mixer, linear: list[int], **config: Any) -> tuple[Any, Any]:
    """A random donor of three layers of width 32 and its hybrid, from closed forms, with codes of many bits."""
    donor = donor_model(**({"layers": 3, "hidden": 32, "std": 0.3} | config))
    ids = token_ids(4, 48)
    method = HybridMLA(donor.config, HybridSettings(0.9, linear_layers=linear, mixer=mixer), "quick")
    method.share_out(whole_model_sensitivities(donor, ids))
    return donor, assembled(donor, method, converted_layers(donor, method, ids))
