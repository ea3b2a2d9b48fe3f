"""Whether a word names a device of torch, which is imported only for what is neither cpu, cuda nor mps."""

from __future__ import annotations

import re

from mhconvert.errors import MhconvertError


def known_device(text: str) -> str:
    """Return the device's name as it is. Raises MhconvertError for one that torch does not know."""
    if re.fullmatch(r"(cpu|cuda|mps)(:\d{1,3})?", text):
        return text
    import torch

    try:
        torch.device(text)
    except RuntimeError as error:
        what = f"device '{text}' cannot be used: it is none of torch's; choose one such as cpu or cuda:0"
        raise MhconvertError(what) from error
    return text
