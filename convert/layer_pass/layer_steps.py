"""The steps that take one layer from the donor to a conversion; a pass takes them for each layer in turn.

    read ▸ observe (the donor's side, once) ▸ convert ▸ refit the block ▸ advance (each conversion's side)

`pipeline` makes one conversion and writes it; `budget_curve` makes several from one observation and writes none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CheckpointError

from ..attention.half_attention import half_layers
from ..attention.linalg import relative_error
from ..attention.rotary import layer_rotary
from ..checkpoint.provenance import recorded_context
from ..donor.donor import Donor
from ..families.facts import cached_part, layer_window
from ..methods.registry import Method
from ..recipe.recipe import Recipe
from ..storage.dtype_cast import cast, require_finite_states
from .context import ConversionContext
from .decoder_layer import Layer, Streams

MAX_RELATIVE_ERROR = 100.0  # of a layer; above this the conversion is considered broken
FIT_STEPS = {"quick": 0, "default": 180, "high": 360}
FIT_TOKENS = 1024  # tokens per optimiser step, or a row where that is longer
BLOCK_ROUNDS = {"quick": 0, "default": 0, "high": 1}  # how often the block's fit reads the calibration text


@dataclass(frozen=True)
class LayerTargets:
    """What the donor's attention reads and gives in one layer: the same for every conversion of it.

    Attributes:
        inputs, targets: of the attention on the fitted rows, (N, L, D) float32 on the CPU.
        held_inputs, held_targets: the same on the held-out rows.
        statistics: what the method keeps of the layer.
        kv_elements: what one token leaves in a cache object, in the mean of `stated_context`.
        cached: by which the same of a converted layer is multiplied, where its method knows of no context.
    """

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    statistics: Any
    kv_elements: float
    cached: float


def stated_context(method: Method, donor: Donor) -> int | None:
    """Tokens for which cache sizes are stated: the method's, or else those that an earlier step planned windows for."""
    return method.cache_context or recorded_context(donor.folder)


def fit_steps(recipe: Recipe) -> int:
    """Return the optimiser steps per layer: the recipe's own, or by effort; 0 is the closed form alone."""
    return FIT_STEPS[recipe.effort] if recipe.fit_steps is None else recipe.fit_steps


def layer_fit_steps(recipe: Recipe, method: Method, length: int) -> int:
    """Return the optimiser steps per layer of a conversion by `method`; 0 where its closed form is all there is.

    Those that an effort means are fewer on rows of a `length` that is more than a step otherwise reads.
    """
    if method.closed_form:
        return 0
    steps = fit_steps(recipe) if method.fit_steps is None else method.fit_steps[recipe.effort]
    return recipe.fit_steps if recipe.fit_steps is not None else steps * FIT_TOKENS // max(FIT_TOKENS, length)


def block_steps(recipe: Recipe, rows: int, length: int) -> int:
    """Return the optimiser steps of the whole block's fit on `rows` rows of `length` tokens; 0 for none."""
    rounds = BLOCK_ROUNDS[recipe.effort] if fit_steps(recipe) else 0
    return rounds * max(1, rows * length // max(FIT_TOKENS, length))


def layer_rows(recipe: Recipe, method: Method, rows: int, length: int) -> int:
    """Return how many of `rows` calibration rows of `length` tokens go through the layers."""
    if method.layer_tokens is None or block_steps(recipe, rows, length):
        return rows
    return min(rows, max(1, method.layer_tokens // length))


def teacher_start(context: ConversionContext, method: Method) -> tuple[Tensor, int]:
    """The teacher's stream before the first layer, and how many of its rows are for fitting."""
    fit = context.rows.fit
    fitted = layer_rows(context.recipe, method, *fit.shape)
    return context.donor.embed(torch.cat((fit[:fitted], context.rows.held_out))), fitted


def student_start(context: ConversionContext, fitted: int) -> Tensor:
    """The student's stream before the first layer: the teacher's rows where blocks are fitted, else the held-out ones;
    with the embedding as it will be written."""
    fit, held_out = context.rows.fit, context.rows.held_out
    blocks = block_steps(context.recipe, *fit.shape)
    return context.donor.embed(torch.cat((fit[:fitted], held_out)) if blocks else held_out, context.dtype)


def read_layer(context: ConversionContext, index: int, length: int) -> Layer:
    """Decoder layer `index` of the donor, the only one in memory, for rows of `length` tokens."""
    donor = context.donor
    rotary = layer_rotary(context.rotary, donor.config, index, length)
    module = donor.decoder_layer(index, context.device)
    window = layer_window(donor.config, index)
    return Layer(module, donor.family.attention_norm, rotary, index, window, context.dtype.itemsize)


def observe(
    context: ConversionContext, layer: Layer, method: Method, teacher: Tensor, fitted: int
) -> LayerTargets:
    """What the donor's attention makes of the teacher's stream, of which the first `fitted` rows are for fitting.

    Afterwards the stream is behind the layer, and the rest of the layer has the weights that will be written.
    """
    fit, held = teacher[:fitted], teacher[fitted:]
    inputs = layer.attention_inputs(fit)
    require_finite_states(layer.index, attention_inputs=inputs)
    statistics = method.observe(layer.attention, inputs, layer.rotary)
    targets = getattr(statistics, "outputs", None)
    if targets is None:
        targets = layer.attend(layer.attention, inputs)
    require_finite_states(layer.index, attention_outputs=targets)
    held_inputs = layer.attention_inputs(held)
    held_targets = layer.attend(layer.attention, held_inputs)
    elements = layer.cache_elements(layer.attention, held_inputs)
    stated = stated_context(method, context.donor)
    part = cached_part(context.donor.config, layer.index, stated)
    cached = 1.0 if stated == method.cache_context else part
    with half_layers(context.device):
        layer.complete(fit, targets)
    layer.complete(held, held_targets)
    del layer.module.self_attn  # the donor's is not written
    _round_to(layer.module, context.dtype, f"layer {layer.index}: ")
    return LayerTargets(inputs, targets, held_inputs, held_targets, statistics, elements * part, cached)


def convert_attention(
    context: ConversionContext, layer: Layer, method: Method, targets: LayerTargets
) -> tuple[Any, dict[str, Any]]:
    """The new attention, closed form and fit, rounded as it will be written; and what was chosen for it."""
    text = (targets.inputs, targets.targets, layer.position_embeddings)
    attention, chosen = method.convert(targets.statistics, layer.index, *text)
    steps = layer_fit_steps(context.recipe, method, targets.inputs.shape[1])
    if steps and not getattr(attention, "closed_form", False):
        options = _fit_options(context, layer, targets.inputs)
        context.fit(attention, *text, steps=steps, **options, **method.fit_options)
    _round_to(attention, context.dtype, f"layer {layer.index}: self_attn.")
    return attention, chosen


def refit_block(context: ConversionContext, layer: Layer, attention: Any, streams: Streams) -> None:
    """Fine-tune the converted attention so that the decoder layer's output matches the donor's, given the student's own
    hidden states (corrects errors of earlier layers).

    The student's stream is still before the layer, the teacher's behind it. Outputs are compared as the norm behind the
    block gives them. Does nothing where the recipe's effort fits no blocks.
    """
    student = streams.student_fitted
    steps = block_steps(context.recipe, len(student), student.shape[1])
    if not steps:
        return
    following = context.donor.norm_behind(layer.index, context.device)
    context.fit(
        layer.block(attention, following),
        student,
        layer.through(following, streams.teacher[: streams.fitted]),
        layer.position_embeddings,
        steps=steps,
        **_fit_options(context, layer, student),
        trained=list(attention.parameters()),
    )
    _round_to(attention, context.dtype, f"layer {layer.index}: self_attn.")


def advance_student(layer: Layer, attention: Any, targets: LayerTargets, student: Tensor) -> dict[str, Any]:
    """Move the student's stream past the converted layer, in place; returns what the held-out rows say of the layer.

    Returns:
        relative_error: of the attention's output, squared; kv_elements: what one token leaves in a cache object.

    Raises:
        CheckpointError: The error is not finite, or larger than any conversion's.
    """
    error = relative_error(layer.attend(attention, targets.held_inputs), targets.held_targets)
    if not math.isfinite(error) or error > MAX_RELATIVE_ERROR:
        raise CheckpointError(
            f"layer {layer.index}: the converted attention's relative error is {error:.3g}; its weights or "
            "statistics are not usable. Try other calibration text or a larger budget"
        )
    elements = getattr(attention, "cache_elements", None)  # where it depends on the length of the text
    if hasattr(attention, "cache_bytes"):
        elements = attention.cache_bytes / layer.element_bytes
    elif elements is None:
        elements = layer.cache_elements(attention, targets.held_inputs)
    layer.complete(student, layer.attend(attention, layer.attention_inputs(student)))
    sizes = {"donor": targets.kv_elements, "converted": elements * targets.cached}
    return {"relative_error": error, "kv_elements": sizes}


def _fit_options(context: ConversionContext, layer: Layer, inputs: Tensor) -> dict[str, int]:
    rows = max(1, FIT_TOKENS // inputs.shape[1])
    return {"rows": rows, "seed": context.recipe.seed * 1000 + layer.index}


@torch.no_grad()
def _round_to(module: Any, dtype: torch.dtype, where: str) -> None:
    """Round all that is stored to `dtype`: what is measured from here on are the weights as they will be written."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(cast(where + name, tensor, dtype))
