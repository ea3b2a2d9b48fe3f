"""The class and the configuration of a donor some of whose layers see a window and the first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from . import modeling_swa


def converted_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_swa, f"SWA{donor.__name__}")


def first_tokens_config(donor_config: Any, windows: Sequence[int | None]) -> Any:
    """The donor's configuration as that of its converted class.

    windows: of each layer; None: what the donor's sees.
    """
    config_class = converted_class(type(donor_config)).config_class
    config = config_class(**class_free_values(donor_config), kv_windows=list(windows))
    config._attn_implementation = "eager" if attention_facts(donor_config).softcap else "sdpa"
    return config
