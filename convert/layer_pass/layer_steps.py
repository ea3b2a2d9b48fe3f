"""The steps that take one layer from the donor to a conversion; a pass takes them for each layer in turn.

    observe (the donor's side, once) ▸ convert ▸ fit ▸ follow (each conversion's side)

`pipeline` makes one conversion and writes it; `budget_curve` makes several from one observation and writes none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.device import half_products
from mhconvert.errors import CheckpointError

from ..attention.linalg import relative_error
from ..attention.rotary import LayerRotary, layer_rotary
from ..donor.donor import Donor
from ..families.facts import layer_window
from ..methods.registry import Method
from ..recipe.recipe import Recipe
from ..storage.dtype_cast import cast, require_finite_states
from .context import ConversionContext
from .decoder_layer import Layer, Streams

ABSURD_ERROR = 100.0  # of a layer's relative error: something is broken, not merely lossy
FIT_STEPS = {"quick": 0, "default": 180, "high": 360}
FIT_TOKENS = 1024  # a step
BLOCK_ROUNDS = {"quick": 0, "default": 0, "high": 1}  # that the whole block's fit reads the calibration text


@dataclass(frozen=True)
class Positions:
    """The donor's rotary module, and the number of tokens in a row of calibration text."""

    module: Any
    length: int


@dataclass(frozen=True)
class DonorLayer:
    """The donor's side of one layer, the same for every conversion of it; (N, L, D) float32 on the CPU.

    inputs, targets: of its attention, on the fitted rows; held_inputs, held_targets: on the held-out ones.
    rotary: the layer's RoPE. statistics: what the method keeps of it. kv_elements: what one token leaves in a
    cache object.
    """

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    rotary: LayerRotary
    statistics: Any
    kv_elements: float


def positions(donor: Donor, length: int, device: torch.device) -> Positions:
    """Return the positions of rows of `length` tokens."""
    return Positions(donor.rotary(device), length)


def read(donor: Donor, index: int, place: Positions, device: torch.device) -> tuple[Layer, LayerRotary]:
    """Return decoder layer `index` of the donor, the only one in memory, and its RoPE."""
    rotary = layer_rotary(place.module, donor.config, index, place.length)
    window = layer_window(donor.config, index)
    module = donor.decoder_layer(index, device)
    return Layer(module, donor.family.attention_norm, rotary.embeddings, window), rotary


def fit_steps(recipe: Recipe) -> int:
    """Return the optimiser steps per layer: the recipe's own, or by effort; 0 is the closed form alone."""
    return FIT_STEPS[recipe.effort] if recipe.fit_steps is None else recipe.fit_steps


def block_steps(recipe: Recipe, rows: int, length: int) -> int:
    """Return the optimiser steps of the whole block's fit on `rows` rows of `length` tokens; 0 for none."""
    rounds = BLOCK_ROUNDS[recipe.effort] if fit_steps(recipe) else 0
    return rounds * max(1, rows * length // FIT_TOKENS)


def observe(
    layer: Layer,
    index: int,
    method: Method,
    teacher: Tensor,
    fitted: int,
    rotary: LayerRotary,
    dtype: torch.dtype,
) -> DonorLayer:
    """What the donor's attention does with the teacher's stream, of which the first `fitted` rows are for fitting.

    Afterwards the stream is behind the layer, and the layer has the weights that will be written (`dtype`).
    """
    fit, held = teacher[:fitted], teacher[fitted:]
    inputs = layer.attention_inputs(fit)
    targets = layer.attend(layer.attention, inputs)
    require_finite_states(index, attention_inputs=inputs, attention_outputs=targets)
    statistics = method.observe(layer.attention, inputs, rotary)
    held_inputs = layer.attention_inputs(held)
    held_targets = layer.attend(layer.attention, held_inputs)
    elements = layer.cache_elements(layer.attention, held_inputs)
    with half_products(rotary.embeddings[0].device):
        layer.complete(fit, targets)
    layer.complete(held, held_targets)
    del layer.module.self_attn  # the donor's is not written
    _round_to(layer.module, dtype, f"layer {index}: ")
    return DonorLayer(inputs, targets, held_inputs, held_targets, rotary, statistics, elements)


def convert(
    context: ConversionContext, method: Method, index: int, seen: DonorLayer
) -> tuple[Any, dict[str, Any]]:
    """Return the new attention of layer `index`, after closed form and fit, rounded to the written dtype."""
    recipe = context.recipe
    inputs, targets, embeddings = seen.inputs, seen.targets, seen.rotary.embeddings
    attention, chosen = method.convert(seen.statistics, index, inputs, targets, embeddings)
    steps = fit_steps(recipe)
    if steps:
        rows = max(1, FIT_TOKENS // inputs.shape[1])
        seed = recipe.seed * 1000 + index
        context.fit(attention, inputs, targets, embeddings, steps=steps, rows=rows, seed=seed)
    _round_to(attention, context.dtype, f"layer {index}: self_attn.")
    return attention, chosen


def refine(context: ConversionContext, layer: Layer, index: int, attention: Any, streams: Streams) -> None:
    """Fit the converted attention once more, so that the whole block gives what the donor's gives on the stream that
    really reaches it: it mends what the layers before have changed.

    streams: the student's is still before the layer, the teacher's behind it. The two are compared in terms of the norm
    that reads the block's output.
    """
    recipe, student = context.recipe, streams.student_fitted
    steps = block_steps(recipe, len(student), student.shape[1])
    if not steps:
        return
    rows = max(1, FIT_TOKENS // student.shape[1])
    seed = recipe.seed * 1000 + index
    place = layer.position_embeddings
    following = context.donor.norm_behind(index, place[0].device)
    block, trained = layer.block(attention, following), list(attention.parameters())
    targets = layer.through(following, streams.teacher[: streams.fitted])
    context.fit(block, student, targets, place, steps=steps, rows=rows, seed=seed, trained=trained)
    _round_to(attention, context.dtype, f"layer {index}: self_attn.")


def follow(layer: Layer, index: int, attention: Any, seen: DonorLayer, student: Tensor) -> dict[str, Any]:
    """Move the student's stream past the converted layer; what the held-out rows say of it.

    relative_error: of the attention output, squared; kv_elements: what one token leaves in a cache object.
    Raises CheckpointError for an error that no conversion can have.
    """
    error = relative_error(layer.attend(attention, seen.held_inputs), seen.held_targets)
    if not math.isfinite(error) or error > ABSURD_ERROR:
        raise CheckpointError(
            f"layer {index}: the converted attention's relative error is {error:.3g}; its weights or "
            "statistics are not usable. Try other calibration text or a larger budget"
        )
    elements = layer.cache_elements(attention, seen.held_inputs)
    layer.complete(student, layer.attend(attention, layer.attention_inputs(student)))
    return {"relative_error": error, "kv_elements": {"donor": seen.kv_elements, "converted": elements}}


@torch.no_grad()
def _round_to(module: Any, dtype: torch.dtype, where: str) -> None:
    """Round the weights to the written dtype, so that everything measured later is of the written model."""
    for name, parameter in module.named_parameters():
        parameter.copy_(cast(where + name, parameter, dtype))
