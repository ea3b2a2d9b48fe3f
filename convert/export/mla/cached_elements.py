"""The refusal of checkpoints whose cache holds codes instead of elements."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import ExportError


def require_elements(reference: str, config: Any) -> None:
    """Raise ExportError where a checkpoint with `config` caches coded latents, which no engine reads."""
    if hasattr(config, "kv_code_counts"):
        raise ExportError(
            f"{reference} caches coded latents (--kv-bits auto), which transformers alone reads; for an engine convert "
            "the donor with --kv-bits 16 --profile portable"
        )
