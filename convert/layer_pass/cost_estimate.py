"""The sizes, memory and disk of a conversion, computed from shapes before any weight is read."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..calibration.calibration_rows import (
    fitted_rows,
    judged_tokens,
    judging_rows,
    row_length,
    token_count,
)
from ..donor.donor import Donor
from ..families.facts import attention_facts, cached_part
from ..methods.registry import Method, whole_elements
from ..recipe.recipe import Recipe
from ..recipe.written_weights import dtype_name
from ..storage.byte_size import SLACK_BYTES
from ..storage.dtype_cast import DTYPES
from .layer_steps import block_steps, layer_rows
from .sensitivity import few_tokens, peak_bytes, stored_bytes, surveyed_shape
from .survey import SAMPLES

RUNTIME_BYTES = 600 << 20  # Python with torch and transformers
# Hidden states that a survey holds for each layer: before it, and how a conversion changes its output.
SURVEY_COPIES = 2
SURVEY_STREAMS = 2 * SAMPLES + 4  # besides: gradients before and behind a layer, the donor's own and results
# Float64 matrices, and rows of keys and values, that a layer's transform and levels take.
BASIS_SQUARES, BASIS_ROWS = 10, 4
STREAM_COPIES = 4  # teacher, attention inputs, attention outputs, and a temporary result


def output_dtype(recipe: Recipe, donor: Donor) -> torch.dtype:
    """Return the dtype of the written weights. Raises MhconvertError for one that cannot be written."""
    if recipe.dtype is None:
        return donor.dtype if donor.dtype in DTYPES.values() else torch.float32
    return DTYPES[dtype_name(recipe.dtype)]


def plan(recipe: Recipe, donor: Donor, method: Method, device: torch.device) -> dict[str, Any]:
    """The plan behind `--dry-run`: geometry, KV arithmetic, parameters, disk and memory needed."""
    config, dtype = donor.config, output_dtype(recipe, donor)
    layers, width = config.num_hidden_layers, dtype.itemsize
    elements = attention_facts(config).kv_elements
    donor_elements = _donor_elements(method, config, elements)
    outer, per_layer, attention = layer_parameters(donor, method)
    converted = outer + layers * (per_layer - attention + method.new_parameters())
    tokens = token_count(recipe, device)
    length = row_length(recipe, config)
    held = recipe.calibration.held_out * length
    rows = fitted_rows(recipe, config, device)
    both = 2 if block_steps(recipe, rows, length) else 1  # the student has the fitted rows too
    fitted = layer_rows(recipe, method, rows, length) * length
    streams = 4 * config.hidden_size * (both * fitted + 2 * held)
    eval_tokens = min(length * judging_rows(length, tokens // length), judged_tokens(recipe, config))
    surveyed, work, kept = _survey(method, config, elements, rows, length)
    states = SURVEY_COPIES * layers + SURVEY_STREAMS
    survey = 4 * config.hidden_size * states * eval_tokens if method.divisible and method.survey_shares else 0
    output_bytes = converted * width
    layer_memory = 4 * (per_layer + method.new_parameters() * 4)
    embedding = config.vocab_size * config.hidden_size * donor.dtype.itemsize
    probe = 4 * config.vocab_size * length * 4
    return {
        "donor": recipe.model,
        "method": recipe.method,
        "family": config.model_type,
        "output": str(recipe.output_folder(donor.name)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "layers": [{"index": i} | method.layer_sizes(i) for i in range(layers)],
        "kv_elements_per_token": {"donor": donor_elements, "converted": method.kv_elements()},
        "kv_bytes_per_token": {"donor": donor_elements * width, "converted": method.kv_bytes(width)},
        "parameters": {"donor": outer + layers * per_layer, "converted": converted},
        **method.totals(),
        **{name: getattr(method, name) for name in ("notice", "cache_context") if getattr(method, name)},
        "output_bytes": output_bytes,
        "disk_needed_bytes": output_bytes + 2 * streams + probe + kept + SLACK_BYTES,
        "memory_needed_bytes": RUNTIME_BYTES
        + max(STREAM_COPIES * streams + work, surveyed, survey)
        + layer_memory
        + embedding
        + probe,
        "calibration": {
            "sources": list(recipe.calibration.sources),
            "tokens": tokens,
            "sequence_length": length,
            **_notice(method, elements, rows, length),
        },
    }


def _donor_elements(method: Method, config: Any, elements: int) -> int:
    """Cache elements per token of the donor, all layers, where each token that a layer caches has `elements`."""
    context = method.cache_context
    parts = (cached_part(config, index, context) for index in range(config.num_hidden_layers))
    return int(whole_elements(elements * sum(parts), context))


def _survey(method: Method, config: Any, elements: int, rows: int, length: int) -> tuple[int, int, int]:
    """Bytes of a survey of sensitivities on `rows` rows of `length` tokens: its memory, a layer's basis, its file."""
    if not method.surveys_sensitivity:
        return 0, 0, 0
    layers = config.num_hidden_layers
    tokens = math.prod(surveyed_shape(rows, length, elements))
    read = min(rows * length, method.layer_tokens or rows * length)
    basis = 8 * (BASIS_SQUARES * elements**2 + BASIS_ROWS * read * elements)
    kept = stored_bytes(elements, layers)
    return peak_bytes(elements, layers, config.hidden_size, tokens), basis, kept


def _notice(method: Method, elements: int, rows: int, length: int) -> dict[str, str]:
    """What a user should know of `rows` rows of text where a survey measures sensitivities: {"notice": …}, or {}."""
    few = few_tokens(math.prod(surveyed_shape(rows, length, elements)), elements)
    return {"notice": few} if method.surveys_sensitivity and few else {}


def layer_parameters(donor: Donor, method: Method) -> tuple[int, int, int]:
    """Return the parameters outside the layers, in one layer, and of those the ones that the method replaces."""
    shapes = donor.shapes()
    names = donor.layer_tensor_names(0)
    prefix = names[0][: names[0].index(".0.") + len(".0.")]
    sizes = {name: math.prod(shapes[name]) for name in names}
    replaced = sum(n for name, n in sizes.items() if name.removeprefix(prefix).startswith(method.replaced))
    outer = sum(math.prod(shapes[name]) for name in donor.outer_tensor_names())
    return outer, sum(sizes.values()), replaced
