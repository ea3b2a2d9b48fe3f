"""One decoder layer of the donor on its own, and the two streams of hidden states that pass through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..attention.rotary import LayerRotary
from ..bare_process.child import cache_storage

STEP_TOKENS = 8192  # that pass through a layer at the same time


@dataclass
class Streams:
    """Hidden states between two layers, float32 on the CPU.

    Attributes:
        teacher: (N, L, D), all calibration rows through the donor, the `fitted` ones first, then the held-out ones.
        student: the same rows, or the held-out ones alone, through the converted layers.
    """

    teacher: Tensor
    student: Tensor
    fitted: int

    @property
    def teacher_held(self) -> Tensor:
        return self.teacher[self.fitted :]

    @property
    def student_held(self) -> Tensor:
        return self.student[len(self.student) - len(self.teacher) + self.fitted :]

    @property
    def student_fitted(self) -> Tensor:
        """The student's fitted rows; empty where only held-out rows pass through the converted layers."""
        return self.student[: len(self.student) - len(self.student_held)]


class _Given(nn.Module):
    """Takes the place of a decoder layer's attention and returns an output that was computed before."""

    output: Tensor

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.output, None


class Block(nn.Module):
    """A decoder layer followed by the next norm, with the call signature of an attention (see `heal.layer_fit.fit`)."""

    def __init__(self, layer: nn.Module, following: nn.Module, surroundings: dict[str, Any]):
        super().__init__()
        self.layer, self._surroundings = layer, surroundings
        self._following = [following]  # in a list, so that its parameters are not the block's

    def forward(self, hidden: Tensor, _: Any) -> tuple[Tensor]:
        # A copy: the fit may scale the input of the attention's maps in place, and the residual must not follow.
        output = self.layer(hidden.clone(), **self._surroundings)
        return (self._following[0](output[0] if isinstance(output, tuple) else output),)


class Layer:
    """One donor decoder layer taken apart: attention input, attention, and the rest of the block.

    Hidden states are (N, L, D) float32 on the CPU; a few rows at a time pass through the layer's device.
    """

    def __init__(
        self,
        module: Any,
        norm: str | None,
        rotary: LayerRotary,
        index: int,
        window: int | None = None,
        element_bytes: int = 2,
    ):
        """
        Args:
            module: the transformers decoder layer.
            norm: the attribute of the norm before its attention; None where there is none.
            rotary: the layer's RoPE for the length of the rows.
            index: of the layer in the model.
            window: tokens that its attention sees; None: all before.
            element_bytes: of the written weights' dtype, in which the bytes of coded caches are counted.
        """
        self.module, self.index, self.rotary = module, index, rotary
        self.element_bytes = element_bytes
        self.attention = module.self_attn
        self.position_embeddings = position_embeddings = rotary.embeddings
        self._norm = getattr(module, norm) if norm else None
        mask = self._attention_mask(window)
        self._surroundings = {"position_embeddings": position_embeddings, "attention_mask": mask}

    def attention_inputs(self, hidden: Tensor) -> Tensor:
        """The block's input behind the norm that precedes the attention, or a copy of it where there is none."""
        return self._by_rows(self._norm, hidden) if self._norm else hidden.clone()

    def through(self, function: Any, hidden: Tensor) -> Tensor:
        """Apply `function` to hidden states, a few rows at a time."""
        return self._by_rows(function, hidden)

    def attend(self, attention: nn.Module, inputs: Tensor) -> Tensor:
        """Return the outputs of `attention`, the donor's or a converted one."""
        return self._by_rows(lambda x: attention(x, **self._surroundings)[0], inputs)

    def complete(self, hidden: Tensor, attention_outputs: Tensor) -> None:
        """Replace the block's input `hidden` by its output, in place, given its attention's output."""
        given = _Given()
        self.module.self_attn = given
        device = self.position_embeddings[0].device
        rows = max(1, STEP_TOKENS // hidden.shape[1])
        with torch.inference_mode():
            for h, y in zip(hidden.split(rows), attention_outputs.split(rows), strict=True):
                given.output = y.to(device)
                h.copy_(self.module(h.to(device)))
        self.module.self_attn = self.attention

    def block(self, attention: nn.Module, following: nn.Module) -> nn.Module:
        """Return the decoder layer with `attention`, followed by the next norm."""
        self.module.self_attn = attention
        return Block(self.module, following, self._surroundings)

    def cache_elements(self, attention: nn.Module, inputs: Tensor) -> float:
        """Elements that one token of `inputs` leaves in a transformers cache object."""
        cache = DynamicCache()
        row = inputs[:1].to(self.position_embeddings[0].device)
        with torch.no_grad():
            attention(row, **self._surroundings, past_key_values=cache)
        return cache_storage(cache, self.element_bytes)[1] / row.shape[1]

    def _attention_mask(self, window: int | None) -> Tensor | None:
        """Additive (1, 1, L, L); None where sdpa's own causal mask is the right one."""
        cos = self.position_embeddings[0]
        length = cos.shape[1]
        windowed = window is not None and window < length
        if not windowed and self.attention.config._attn_implementation == "sdpa":
            return None
        position = torch.arange(length, device=cos.device)
        distance = position[:, None] - position[None]
        hidden = (distance < 0) | (distance >= (window or length))
        mask = torch.zeros(1, 1, length, length, device=cos.device)
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def _by_rows(self, function: Any, tensor: Tensor) -> Tensor:
        """`function` of `tensor`, STEP_TOKENS at a time on the device; the result is where `tensor` is."""
        device = self.position_embeddings[0].device
        result = torch.empty_like(tensor)
        rows = max(1, STEP_TOKENS // tensor.shape[1])
        with torch.no_grad():
            for source, target in zip(tensor.split(rows), result.split(rows), strict=True):
                target.copy_(function(source.to(device)))
        return result
