"""Whether a folder holds a whole model or an adapter."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


KINDS = ("config.json", ADAPTER_CONFIG)  # one of which every folder that we write holds


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, which has a base model elsewhere."""
    return (folder / ADAPTER_CONFIG).is_file()
