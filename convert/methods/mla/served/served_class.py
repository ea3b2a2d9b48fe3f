"""The transformers class of a donor whose latent attention is in the served form."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from . import modeling_served


def served_class(donor_config_class: Any) -> Any:
    """The causal language model that holds a donor of a configuration class in the served form."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_served, f"MLAServed{donor.__name__}")
