"""Models whose logits are no numbers are refused: an accuracy made from them would look like one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from mhconvert.errors import MhconvertError


def refuse_nan(model: Any, reference: str) -> Any:
    """The model, which from now on raises MhconvertError with `reference` where its logits are NaN."""

    def check(_: Any, __: Any, output: Any) -> None:
        if torch.isnan(output.logits).any():
            raise _refusal(reference, model.dtype)

    model.register_forward_hook(check)
    return model


def refuse_nan_scores(lm: Any, reference: str, dtype: torch.dtype) -> Any:
    """lm-eval's `lm`, whose engine keeps its logits to itself: from now on log-likelihoods that are NaN are refused."""

    def checked(score: Callable[..., Any]) -> Callable[..., Any]:
        def scores(*arguments: Any, **options: Any) -> Any:
            found = score(*arguments, **options)
            if any(math.isnan(each[0] if isinstance(each, tuple) else each) for each in found):
                raise _refusal(reference, dtype)
            return found

        return scores

    for name in ("loglikelihood", "loglikelihood_rolling"):
        setattr(lm, name, checked(getattr(lm, name)))
    return lm


def _refusal(reference: str, dtype: torch.dtype) -> MhconvertError:
    return MhconvertError(
        f"{reference} gives logits that are NaN in {str(dtype).removeprefix('torch.')}; evaluate it with "
        "--dtype float32, or convert it again"
    )
