"""The logits of a row's last positions, without those before where the model can leave them out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def last_logits(model: Any, ids: Tensor, keep: int) -> Tensor:
    """Logits (keep, vocab_size) of the last `keep` positions of the row `ids` (1, length), in the model's dtype."""
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "use_cache": False}
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        inputs["logits_to_keep"] = keep
    with torch.inference_mode():
        logits: Tensor = model(**inputs).logits[0, -keep:]
    return logits
