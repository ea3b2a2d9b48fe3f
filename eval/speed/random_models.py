"""Models from a config alone: their size, and one with random weights to time."""

from __future__ import annotations

from typing import Any

import torch


def parameters(config: Any) -> int:
    """The number of parameters of a model with this config."""
    with torch.device("meta"):
        return _model(config, torch.float32).num_parameters()


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with this config on `device`, with the weights of its initialisation, always the same ones."""
    torch.manual_seed(0)
    with device:
        return _model(config, dtype).eval().requires_grad_(False)


def _model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from ...convert.donor.tensor_layout import attention_implementation

    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention_implementation(config)
    )
