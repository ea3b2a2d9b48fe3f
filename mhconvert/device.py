"""The torch device that a command runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mhconvert.errors import MhconvertError


def pick_device(name: str | None) -> torch.device:
    """The torch device `name`; None for CUDA if present, else the CPU.

    Raises:
        MhconvertError: the device cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise MhconvertError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


def half_products(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which matrix products are computed in bfloat16 if `device` has instructions for it, else no-op.

    The relative squared error is about 1e-5, far below that of a conversion.
    """
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        faster = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16) if faster else nullcontext()
