"""Which torch device a command runs on."""

from __future__ import annotations

import torch

from mhconvert.convert.errors import MhconvertError


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
