"""Layer-local healing: each decoder layer is trained on the output of the teacher's layer.

The layers are trained in order, each on the hidden states that the student's trained layers before it produce. So a
layer also corrects the errors of earlier ones, unlike in the conversion, which used the teacher's hidden states. The
target is the block's output after the norm of the next block. No backward pass crosses a layer.

Source: the target is that of the intermediate-layer distillation of Zebra-Llama, arXiv 2505.17272, which feeds the
teacher's hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.device import half_products
from mhconvert.progress import Listener, Progress

from ..convert.families.facts import family_of
from ..convert.layer_pass.decoder_layer import Block
from .layer_fit import fit

STEP_TOKENS = 1024  # per optimiser step
PASS_TOKENS = 8192  # per forward pass of a layer


def fit_blocks(
    student: Any, teacher: Any, ids: Tensor, *, tokens: int, train: str, seed: int, on_progress: Listener
) -> None:
    """Train the layers of `student` in place, in order.

    A layer whose error on held-out rows does not fall is restored. Document boundaries inside rows are ignored.

    Args:
        ids: (N, L), token ids.
        tokens: per layer.
        train: "all" for whole layers, else only the attention.
    """
    student.requires_grad_(False)
    pairs = list(zip(_layers(student), _layers(teacher), _norms(teacher), strict=True))
    device = next(student.parameters()).device
    student_stream, teacher_stream = _Stream(student, ids, device), _Stream(teacher, ids, device)
    rows = max(1, STEP_TOKENS // ids.shape[1])
    for index, (layer, original, following) in enumerate(pairs):
        teacher_stream.advance(original, index)
        block = Block(layer, following, student_stream.layer_arguments[index])
        fitted: Any = layer if train == "all" else layer.self_attn
        targets = _apply(following, teacher_stream.hidden, device)
        steps = max(1, tokens // (rows * ids.shape[1]))
        unused = (torch.empty(0, device=device),) * 2  # `Block` has its position embeddings
        fit(
            block,
            student_stream.hidden,
            targets,
            unused,
            steps=steps,
            rows=rows,
            seed=seed + index,
            trained=list(fitted.parameters()),
        )
        student_stream.advance(layer, index)
        on_progress(Progress("blocks", index + 1, len(pairs)))


class _Stream:
    """The hidden states of all rows between two layers of a model.

    Attributes:
        hidden: (N, L, D), float32, on the CPU.
        layer_arguments: for each layer, its other arguments, which are the same for every row.
    """

    def __init__(self, model: Any, ids: Tensor, device: torch.device):
        self._device = device
        self.layer_arguments = _layer_arguments(model, ids[:1].to(device))
        rows = max(1, PASS_TOKENS // ids.shape[1])
        self.hidden = torch.cat(
            [_first_input(model, part.to(device)).float().cpu() for part in ids.split(rows)]
        )

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by the output of `layer`, the layer with this index."""
        rows = max(1, PASS_TOKENS // self.hidden.shape[1])
        with torch.inference_mode(), half_products(self._device):
            for part in self.hidden.split(rows):
                part.copy_(_output(layer, part.to(self._device), self.layer_arguments[index]))


class _StopForward(Exception):
    """Ends a forward pass early."""


@torch.no_grad()
def _first_input(model: Any, ids: Tensor) -> Tensor:
    """The input (B, L, D) of the first layer for `ids` (B, L)."""
    captured: list[Tensor] = []

    def stop(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        captured.append(arguments[0] if arguments else keywords["hidden_states"])
        raise _StopForward

    hook = _layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.get_decoder()(input_ids=ids, use_cache=False)
    except _StopForward:
        pass
    finally:
        hook.remove()
    return captured[0]


@torch.no_grad()
def _layer_arguments(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """The masks and position embeddings that the model passes to each layer for rows of this length."""
    arguments: list[dict[str, Any]] = []

    def keep(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        arguments.append({name: value for name, value in keywords.items() if name != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in _layers(model)]
    model.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return arguments


def _output(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _apply(function: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
    """function(hidden) on the CPU, computed a few rows at a time on `device`."""
    rows = max(1, PASS_TOKENS // hidden.shape[1])
    with torch.no_grad():
        return torch.cat([function(part.to(device)).cpu() for part in hidden.split(rows)])


def _layers(model: Any) -> nn.ModuleList:
    return model.get_decoder().layers


def _norms(teacher: Any) -> list[nn.Module]:
    """For each layer, the norm that reads its output: the next layer's attention norm, or the final norm."""
    family, decoder = family_of(teacher.config), teacher.get_decoder()
    name = family.attention_norm
    between = [getattr(layer, name) if name else nn.Identity() for layer in decoder.layers[1:]]
    return [*between, getattr(decoder, family.final_norm)]
