"""A donor's attention with a window and the first tokens, as a survey runs it; nothing of this is shipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from ..mla.modeling_coded_window import FIRST, Window, first_slots
from ..swa.layer import windowed_attention

IMPLEMENTATION = "mhconvert_first_tokens"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers for `windowed_donor`; the mask is made here."""
    slots = torch.arange(query.shape[2], device=query.device)
    view = Window(module.window, slots, first_slots(slots[:1]), slots, None)
    outputs, softcap = [], options.get("softcap")
    for rows, columns in view.blocks():
        own, keys, values = query[:, :, rows], *(_held(x, columns) for x in (key, value))
        mask = view.mask(rows, columns, query.dtype)
        if softcap is not None:
            output, _ = eager_attention_forward(
                module, own, keys, values, mask, scaling=scaling, softcap=softcap
            )
        else:
            grouped = query.shape[1] != key.shape[1]
            output = scaled_dot_product_attention(
                own, keys, values, mask, scale=scaling, enable_gqa=grouped
            ).transpose(1, 2)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _held(x: Tensor, recent: slice) -> Tensor:
    """Of (B, G, T, d) the first tokens and the recent ones."""
    return torch.cat((x[:, :, :FIRST], x[:, :, recent]), dim=2)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)


def windowed_donor(attention: Any, window: int) -> Any:
    """A copy of a donor's attention that sees `window` tokens and the first ones."""
    module = windowed_attention(attention, window)
    module.config._attn_implementation = IMPLEMENTATION
    return module
