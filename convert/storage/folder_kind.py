"""The kind of a model folder: a whole model or an adapter."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
KINDS = ("config.json", ADAPTER_CONFIG)  # every folder that mhconvert writes has one of them


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is an adapter, whose base model is elsewhere."""
    return (folder / ADAPTER_CONFIG).is_file()
