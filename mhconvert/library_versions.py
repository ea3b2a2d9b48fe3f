"""Versions of everything that decides a result's bits."""

from __future__ import annotations

import platform

import safetensors
import torch
import transformers

from mhconvert.version import __version__


def versions() -> dict[str, str]:
    """Of everything that decides a result's bits."""
    return {
        "mhconvert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
