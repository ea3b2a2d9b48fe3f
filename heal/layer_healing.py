"""Layer-local healing on the student's own stream: each decoder layer learns its teacher layer's output.

Layer by layer, on what the layers before it have made of the text: so a layer mends the errors that reach it, where
the pass that converted it saw the teacher's stream. The target is the whole block's output as the next block's norm
reads it. No backward pass through more than one layer. (Zebra-Llama's intermediate-layer distillation, arXiv
2505.17272, has the same target and feeds the teacher's stream.)
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

STEP_TOKENS = 1024  # that a step reads
PASS_TOKENS = 8192  # that pass through a layer at the same time


def fit_blocks(
    student: Any, teacher: Any, ids: Tensor, *, tokens: int, train: str, seed: int, tell: Listener
) -> None:
    """Train the layers of `student` in place, the first one first, each on `tokens` tokens of `ids` (N, L).

    train: "all" of a layer, or its attention. Rows are read as plain text by both models, across what may be document
    boundaries. A layer whose output on unseen rows has not come nearer is left as it was.
    """
    student.requires_grad_(False)
    pairs = list(zip(_layers(student), _layers(teacher), _norms(teacher), strict=True))
    device = next(student.parameters()).device
    ours, theirs = _Stream(student, ids, device), _Stream(teacher, ids, device)
    rows = max(1, STEP_TOKENS // ids.shape[1])
    for index, (layer, original, following) in enumerate(pairs):
        theirs.advance(original, index)
        block = Block(layer, following, ours.surroundings[index])
        fitted: Any = layer if train == "all" else layer.self_attn
        targets = _by_rows(following, theirs.hidden, device)
        steps = max(1, tokens // (rows * ids.shape[1]))
        place = (torch.empty(0, device=device),) * 2  # the block knows its positions
        fit(
            block,
            ours.hidden,
            targets,
            place,
            steps=steps,
            rows=rows,
            seed=seed + index,
            trained=list(fitted.parameters()),
        )
        ours.advance(layer, index)
        tell(Progress("blocks", index + 1, len(pairs)))


class _Stream:
    """Hidden states (N, L, D) of all rows between two layers of a model, float32 on the CPU.

    surroundings: what each layer is given beside them, the same for every row.
    """

    def __init__(self, model: Any, ids: Tensor, device: torch.device):
        self._device = device
        self.surroundings = _surroundings(model, ids[:1].to(device))
        rows = max(1, PASS_TOKENS // ids.shape[1])
        self.hidden = torch.cat(
            [_first_input(model, part.to(device)).float().cpu() for part in ids.split(rows)]
        )

    def advance(self, layer: nn.Module, index: int) -> None:
        """Pass the stream through `layer`, in place."""
        rows = max(1, PASS_TOKENS // self.hidden.shape[1])
        with torch.inference_mode(), half_products(self._device):
            for part in self.hidden.split(rows):
                part.copy_(_output(layer, part.to(self._device), self.surroundings[index]))


class _Found(Exception):
    """Raised to end a forward pass once the wanted input was seen."""


@torch.no_grad()
def _first_input(model: Any, ids: Tensor) -> Tensor:
    """Return the input of the first layer for `ids`."""
    found: list[Tensor] = []

    def stop(_: Any, arguments: tuple[Any, ...], words: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else words["hidden_states"])
        raise _Found

    hook = _layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.get_decoder()(input_ids=ids, use_cache=False)
    except _Found:
        pass
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def _surroundings(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Return the masks and position embeddings that the model passes to each layer for rows of this length."""
    found: list[dict[str, Any]] = []

    def keep(_: Any, __: Any, words: dict[str, Any]) -> None:
        found.append({name: value for name, value in words.items() if name != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in _layers(model)]
    model.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _output(layer: nn.Module, hidden: Tensor, surroundings: dict[str, Any]) -> Tensor:
    output = layer(hidden, **surroundings)
    return output[0] if isinstance(output, tuple) else output


def _by_rows(function: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
    rows = max(1, PASS_TOKENS // hidden.shape[1])
    with torch.no_grad():
        return torch.cat([function(part.to(device)).cpu() for part in hidden.split(rows)])


def _layers(model: Any) -> nn.ModuleList:
    return model.get_decoder().layers


def _norms(teacher: Any) -> list[nn.Module]:
    """Return the norm that reads each layer's output: the next layer's attention norm, or the model's last norm."""
    family, decoder = family_of(teacher.config), teacher.get_decoder()
    name = family.attention_norm
    between = [getattr(layer, name) if name else nn.Identity() for layer in decoder.layers[1:]]
    return [*between, getattr(decoder, family.final_norm)]
