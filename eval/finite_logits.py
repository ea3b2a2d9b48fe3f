"""Models whose logits are no numbers are refused: an accuracy made from them would look like one."""

from __future__ import annotations

from typing import Any

import torch

from mhconvert.errors import MhconvertError


def refuse_nan(model: Any, reference: str) -> Any:
    """The model, which from now on raises MhconvertError with `reference` where its logits are NaN."""

    def check(_: Any, __: Any, output: Any) -> None:
        if torch.isnan(output.logits).any():
            raise MhconvertError(
                f"{reference} gives logits that are NaN in {str(model.dtype).removeprefix('torch.')}; evaluate it with "
                "--dtype float32, or convert it again"
            )

    model.register_forward_hook(check)
    return model
