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
from ..methods.cache_elements import cache_elements
from ..methods.layer_sensitivity import SAMPLE_TOKENS
from ..methods.registry import Method, info, whole_elements
from ..recipe.recipe import Recipe
from ..recipe.tolerance import on_policy
from ..recipe.written_weights import dtype_name
from ..storage.byte_size import SLACK_BYTES
from ..storage.dtype_cast import DTYPES
from .layer_steps import block_steps, layer_rows, stated_context
from .sensitivity import few_tokens, peak_bytes, stored_bytes, surveyed_shape
from .survey import SAMPLES

RUNTIME_BYTES = 600 << 20  # Python with torch and transformers
# Hidden states that a survey holds for each layer: before it, and how a conversion changes its output.
SURVEY_COPIES = 2
SURVEY_STREAMS = 2 * SAMPLES + 4  # besides: gradients before and behind a layer, the donor's own and results
# Float64 matrices, and rows of keys and values, that a layer's transform and levels take.
BASIS_SQUARES, BASIS_ROWS = 10, 4
ESTIMATE = (
    "the size of the cache is an estimate: an earlier step left windows in some layers, and layers may get unequal "
    "parts of the budget; the report has what was measured"
)
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
    outer, in_layers, attention = all_parameters(donor, method)
    converted = outer + in_layers - attention + layers * method.new_parameters()
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
    layer_memory = 4 * (in_layers // layers + method.new_parameters() * 4)
    embedding = config.vocab_size * config.hidden_size * donor.dtype.itemsize
    probe = 4 * config.vocab_size * length * 4
    read_and_write = 4 * (outer + in_layers + converted) * on_policy(recipe.tolerance)  # both models
    return {
        "donor": recipe.model,
        "method": recipe.method,
        "family": config.model_type,
        "output": str(recipe.output_folder(donor.name)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        **_layers(recipe, method, layers),
        **_cache_sizes(method, donor, width),
        "parameters": {"donor": outer + in_layers, "converted": converted},
        **method.totals(),
        **({"notice": method.notice} if method.notice else {}),
        "output_bytes": output_bytes,
        "disk_needed_bytes": output_bytes + 2 * streams + probe + kept + SLACK_BYTES,
        "memory_needed_bytes": RUNTIME_BYTES
        + max(STREAM_COPIES * streams + work, surveyed, survey, read_and_write)
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


def _layers(recipe: Recipe, method: Method, count: int) -> dict[str, Any]:
    """{"layers": what each becomes}, and behind a survey of the method's own kind {"priced": {kind: what `costs` are
    of}}."""
    layers: list[dict[str, Any]] = [{"index": i} | method.layer_sizes(i) for i in range(count)]
    kind = info(recipe.method).layer_kind
    measured = any(kind in layer.get("costs", {}) for layer in layers)
    priced = {"priced": {kind: {"method": recipe.method} | method.kind_facts}} if measured else {}
    return {"layers": layers, **priced}


def donor_elements(config: Any, context: int | None) -> int:
    """Cache elements per token of a donor, all layers together, where the cache holds `context` tokens."""
    parts = (own * cached_part(config, index, context) for index, own in enumerate(cache_elements(config)))
    return int(whole_elements(sum(parts), context))


def _cache_sizes(method: Method, donor: Donor, width: int) -> dict[str, Any]:
    """What a plan says of the cache, whose elements have `width` bytes.

    A method that knows of no context keeps the windows of an earlier step: of its cache the same part is used.
    """
    context, whole = stated_context(method, donor), sum(cache_elements(donor.config))
    of_donor = donor_elements(donor.config, context)
    elements, size = method.kv_elements(), method.kv_bytes(width)
    if context != method.cache_context:
        elements, size = (int(-(-number * of_donor // whole)) for number in (elements, size))
    return {
        "kv_elements_per_token": {"donor": of_donor, "converted": elements},
        "kv_bytes_per_token": {"donor": of_donor * width, "converted": size},
        **({"cache_context": context} if context else {}),
        **({"cache_estimate": ESTIMATE} if context != method.cache_context and method.divisible else {}),
    }


def _survey(method: Method, config: Any, elements: int, rows: int, length: int) -> tuple[int, int, int]:
    """Bytes of a survey of sensitivities on `rows` rows of `length` tokens: its memory, a layer's basis, its file."""
    if not method.surveys_sensitivity:
        return 0, 0, 0
    layers = config.num_hidden_layers
    shape = surveyed_shape(rows, length, elements)
    basis = 8 * (BASIS_SQUARES * elements**2 + BASIS_ROWS * SAMPLE_TOKENS * elements)
    kept = stored_bytes(elements, layers, *shape)
    return peak_bytes(elements, layers, config.hidden_size, *shape), basis, kept


def _notice(method: Method, elements: int, rows: int, length: int) -> dict[str, str]:
    """What a user should know of `rows` rows of text where a survey measures sensitivities: {"notice": …}, or {}."""
    few = few_tokens(math.prod(surveyed_shape(rows, length, elements)), elements)
    return {"notice": few} if method.surveys_sensitivity and few else {}


def parameters(donor: Donor) -> int:
    """Return the donor's parameters, a tied head not counted."""
    return sum(map(math.prod, donor.shapes().values()))


def all_parameters(donor: Donor, method: Method) -> tuple[int, int, int]:
    """Return the parameters outside the layers, in all layers, and of those the ones that the method replaces."""
    outer, inside, replaced = (
        sum(math.prod(donor.shapes()[name]) for name in donor.outer_tensor_names()),
        0,
        0,
    )
    for index in range(donor.config.num_hidden_layers):
        sizes = {name: math.prod(donor.layout.shapes[name]) for name in donor.layer_tensor_names(index)}
        mark = f".{index}."
        own = (n for name, n in sizes.items() if name.partition(mark)[2].startswith(method.replaced))
        inside, replaced = inside + sum(sizes.values()), replaced + sum(own)
    return outer, inside, replaced
