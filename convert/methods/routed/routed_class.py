"""The class of a model whose heads are routed and whose donor's class is a converted one.

This file is shipped inside converted checkpoints: it imports its siblings only.
"""

import sys
from collections.abc import Callable
from typing import Any

from .modeling_moh import MixtureOfHeadForCausalLM, MixtureOfHeadModel


def routed_class(name: str, donor: Any, attention: Any, config_class: Callable[[str], Any]) -> Any:
    """The class `name`: the model `donor` with every `self_attn` wrapped in `attention`, in whose module it lies."""
    module, config = attention.__module__, config_class(f"MoH{donor.config_class.__name__}")
    body = {"__module__": module, "config_class": config, "attention_class": attention}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": attention}
        return type(name, (MixtureOfHeadModel, donor), body)
    body["decoder_class"] = getattr(sys.modules[module], f"MoH{donor.decoder_class.__name__}")
    return type(name, (MixtureOfHeadForCausalLM, donor), body)
