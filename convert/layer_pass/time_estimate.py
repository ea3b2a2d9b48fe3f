"""How long a conversion takes on this machine: what its stages multiply, at the rates of a half-second probe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.device import half_products

from ..calibration.calibration_rows import (
    fitted_rows,
    judged_tokens,
    judging_rows,
    row_length,
    rows_to_sample,
    sampled_texts,
)
from ..calibration.token_rows import batches_of
from ..donor.donor import Donor
from ..families.facts import attention_facts
from ..methods.registry import Method
from ..recipe.recipe import Recipe
from .conversion_report import probe_rows
from .cost_estimate import all_parameters
from .layer_steps import FIT_TOKENS, block_steps, layer_fit_steps, layer_rows
from .sensitivity import surveyed_shape
from .survey import SAMPLES, statistics_tokens

PROBE_SECONDS = 0.12  # for each of four rates
SIZE = 1024  # of the matrices that are multiplied
START_SECONDS = 4.0  # of a process with torch and transformers, whatever the donor
# By how much a stage is slower than its products alone, on two cores: attention, copies, and what is not multiplied.
SAMPLING_FACTOR, SURVEY_FACTOR, NEEDS_FACTOR, PASS_FACTOR, FIT_FACTOR = 3.0, 2.2, 1.3, 2.5, 2.4
SURGERY_PRODUCTS = 100  # of float64 matrices as wide as the hidden states, that a layer's closed form takes


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        single, half, double: floating-point operations of products in float32, as `half_products` makes them, and in
            float64 on the CPU.
        read: bytes of weights that one row is multiplied by.
    """

    single: float
    half: float
    double: float
    read: float


def probe(device: torch.device) -> Rates:
    """The rates of `device`, measured in half a second."""
    square, row = torch.randn(SIZE, SIZE, device=device), torch.randn(1, SIZE, device=device)
    weights = torch.randn(16 * SIZE, SIZE, device=device)
    exact = square[: SIZE // 2, : SIZE // 2].cpu().double()

    def halves() -> Tensor:
        with half_products(device):
            return square @ square

    return Rates(
        single=2 * SIZE**3 / _seconds(lambda: square @ square),
        half=2 * SIZE**3 / _seconds(halves),
        double=SIZE**3 / 4 / _seconds(lambda: exact @ exact),
        read=weights.nbytes / _seconds(lambda: row @ weights.mT),
    )


def _seconds(work: Callable[[], Tensor]) -> float:
    """Of one call of `work`, the mean of those in PROBE_SECONDS."""
    work().flatten()[0].item()
    begun, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < PROBE_SECONDS:
        work().flatten()[0].item()  # which waits for the device
        calls += 1
    return taken / calls


def expected_seconds(
    recipe: Recipe, donor: Donor, method: Method, device: torch.device, rates: Rates
) -> dict[str, float]:
    """By stage, as `stage_seconds` of a report: within a factor of two on an idle machine that has the memory.

    Of a mixture of experts all are counted, so that it takes less.
    """
    config, length = donor.config, row_length(recipe, donor.config)
    layers, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    outer, inside, _ = all_parameters(donor, method)
    layer = inside // layers
    rows = fitted_rows(recipe, config, device)
    held = recipe.calibration.held_out * length
    text = layer_rows(recipe, method, rows, length) * length
    step = max(FIT_TOKENS, length)
    fitted = step * layer_fit_steps(recipe, method, length) * method.new_parameters()
    fitted_layers = layers if method.fitted_layers is None else method.fitted_layers
    blocks = step * block_steps(recipe, rows, length) * layer
    passed = 2 * layers * layer * (text / rates.half + 2 * held / rates.single)
    return {
        "donor": START_SECONDS,
        "calibrate": _calibration(
            recipe, donor, rows + recipe.calibration.held_out, outer + layers * layer, rates
        ),
        "survey": _survey(recipe, method, config, rows, length, layer, rates) if method.divisible else 0.0,
        "layers": PASS_FACTOR * passed
        + FIT_FACTOR * 6 * (fitted_layers * fitted + layers * blocks) / rates.half
        + SURGERY_PRODUCTS * 2 * layers * config.hidden_size**3 / rates.double,
        "verify": START_SECONDS
        + PASS_FACTOR * 2 * (layers * layer + head) * probe_rows(length) * length / rates.single
        if recipe.verify
        else 0.0,
    }


def _calibration(recipe: Recipe, donor: Donor, rows: int, parameters: int, rates: Rates) -> float:
    """Of the sampled ones of `rows` rows: tokenising takes seconds at most; `parameters` of the whole donor."""
    rows = rows_to_sample(recipe, rows)
    texts, length = sampled_texts(recipe, donor.config)
    steps = length * batches_of(rows * texts, length)
    products = SAMPLING_FACTOR * 2 * parameters * rows * texts * length / rates.single
    return products + steps * 4 * parameters / rates.read


def _survey(
    recipe: Recipe, method: Method, config: Any, rows: int, length: int, layer: int, rates: Rates
) -> float:
    """Of `rows` rows of `length` tokens, through layers of `layer` parameters."""
    layers, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    if method.surveys_sensitivity:
        elements = attention_facts(config).kv_elements
        tokens = math.prod(surveyed_shape(rows, length, elements))
        products = (6 * layers * layer + 4 * head) / rates.half + 4 * layers * elements**2 / rates.double
        seconds = SURVEY_FACTOR * tokens * products
        if not method.survey_shares:
            return seconds
    else:
        seconds = 0.0
    judged = judging_rows(length, rows) * min(length, judged_tokens(recipe, config))
    fitted = min(statistics_tokens(config.hidden_size), rows * length)
    forward = 2 * layers * layer * (fitted + judged * (2 + len(method.survey_shares))) / rates.single
    backward = 2 * judged * (1 + SAMPLES) * (layers * layer + head) / rates.half
    return seconds + NEEDS_FACTOR * (forward + backward)
