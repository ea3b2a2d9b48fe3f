"""Classes of converted models in transformers' Auto classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from ..families.facts import FAMILIES


def register_classes(converted_class: Callable[[Any], Any]) -> None:
    """Make transformers' Auto classes know the converted class of every family in this process; may be called again.

    Args:
        converted_class: from a donor's configuration class to the causal language model that holds its conversion.
    """
    for family in FAMILIES.values():
        if family.refused is not None:
            continue
        model = converted_class(CONFIG_MAPPING[family.model_type])
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
