"""Which torch device a command runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mhconvert.errors import MhconvertError


def pick_device(name: str | None) -> torch.device:
    """The torch device called `name`; None: CUDA if present. Raises MhconvertError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise MhconvertError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


def half_products(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which matrix products read their inputs in bfloat16, where `device` multiplies that faster.

    It costs a relative squared error of some 1e-5, far less than a conversion loses.
    """
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        faster = any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16) if faster else nullcontext()
