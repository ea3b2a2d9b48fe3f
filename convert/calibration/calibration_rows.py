"""The rows of token ids that a conversion is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CalibrationError
from mhconvert.progress import Listener

from ..donor.donor import Donor
from ..families.facts import layer_window
from ..methods.method_info import MethodInfo
from ..methods.registry import info
from ..recipe.calibration_settings import SHORTEST_ROW
from ..recipe.recipe import Recipe
from .documents import check_sources
from .token_rows import require_embedded, sampled_rows, text_rows

# That are sampled on end for a row of no asked length: each takes a step, and half as many steps of twice as many rows
# take half the time.
SAMPLED_TEXT = 256
JUDGES, JUDGE_TOKENS = 4, 2048  # the most rows, and tokens in all, on which a survey measures layers

# (source, device) -> effort -> tokens. Text costs one forward pass, sampled text one decoding step per token of a row.
DEFAULT_TOKENS = {
    ("text", "cpu"): {"quick": 8192, "default": 65536, "high": 131072},
    ("text", "cuda"): {"quick": 65536, "default": 131072, "high": 262144},
    ("self", "cpu"): {"quick": 4096, "default": 16384, "high": 65536},
    ("self", "cuda"): {"quick": 65536, "default": 131072, "high": 262144},
}


@dataclass(frozen=True)
class Rows:
    """The token ids of a conversion, each (rows, length).

    Attributes:
        fit: for calibration.
        held_out: for measuring errors.
        sources: of each held-out row: a file, a dataset or "self"; empty where they are not known.
    """

    fit: Tensor
    held_out: Tensor
    sources: tuple[str, ...] = ()


def token_count(recipe: Recipe, device: torch.device) -> int:
    """The number of calibration tokens: the recipe's, or the default for its source, device and effort."""
    if recipe.calibration.tokens is not None:
        return recipe.calibration.tokens
    source = "self" if "self" in recipe.calibration.sources else "text"
    device_type = "cpu" if device.type == "cpu" else "cuda"
    return DEFAULT_TOKENS[source, device_type][recipe.effort]


def row_length(recipe: Recipe, config: Any) -> int:
    """The tokens per row: the recipe's, or its method's limited by the donor's context."""
    wanted = _telling_row(recipe, config)
    limit = getattr(config, "max_position_embeddings", None) or wanted
    chosen = recipe.calibration.sequence_length
    return min(wanted, limit) if chosen is None else chosen


def _telling_row(recipe: Recipe, config: Any) -> int:
    """The tokens that a row of the recipe's method should have."""
    method = info(recipe.method)
    return max(method.row_tokens, method.telling_row(config, recipe.settings) if method.telling_row else 0)


def fitted_rows(recipe: Recipe, config: Any, device: torch.device) -> int:
    """How many rows the calibration tokens fill, rounded up; the held-out ones are not among them."""
    return -(-token_count(recipe, device) // row_length(recipe, config))


def sampled_texts(recipe: Recipe, config: Any) -> tuple[int, int]:
    """How many sampled texts a row is made of, and how many tokens each has: the last may be cut."""
    length = row_length(recipe, config)
    whole = recipe.calibration.sequence_length or info(recipe.method).row_tokens > MethodInfo.row_tokens
    texts = 1 if whole else -(-length // SAMPLED_TEXT)
    return texts, -(-length // texts)


def check(recipe: Recipe, config: Any, least: int = 0) -> None:
    """Check the calibration settings against the donor's config, before any text is read.

    least: tokens that a row needs for the method to show in it.

    Raises:
        CalibrationError: no text can satisfy the settings.
        TextError: a text file is missing or not readable.
    """
    calibration, length = recipe.calibration, row_length(recipe, config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise CalibrationError(
            f"sequence_length={length} is more than the donor reads; choose --sequence-length ≤ {limit}"
        )
    if length < SHORTEST_ROW:
        raise CalibrationError(f"the donor reads {length} tokens, too few for a row; it takes {SHORTEST_ROW}")
    if length < least:
        own = any(layer_window(config, index) for index in range(config.num_hidden_layers))
        raise CalibrationError(
            f"rows of {length} tokens show nothing of a window of {least - 1}; choose --sequence-length > {least - 1}, "
            f"best several times as long{'' if own else ', or a narrower window'}"
        )
    if calibration.tokens is not None and calibration.tokens < length:
        raise CalibrationError(
            f"{calibration.tokens} calibration tokens do not fill one row of {length}; ask for more, or for "
            "shorter rows with --sequence-length"
        )
    check_sources(texts_of(recipe))


def texts_of(recipe: Recipe) -> tuple[str, ...]:
    """The sources that are read, not sampled from the donor."""
    return tuple(source for source in recipe.calibration.sources if source != "self")


def rows_to_sample(recipe: Recipe, rows: int) -> int:
    """How many of `rows` rows are sampled from the donor: all, none, or the part of one source, rounded up."""
    return -(-rows // len(recipe.calibration.sources)) if "self" in recipe.calibration.sources else 0


def judged_tokens(recipe: Recipe, config: Any) -> int:
    """The most tokens of a row that a survey measures layers on."""
    return max(JUDGE_TOKENS, _telling_row(recipe, config))


def judging_rows(length: int, rows: int) -> int:
    """The number of rows on which a survey measures layers, out of `rows` rows of `length` tokens.

    It is limited because the survey keeps the inputs of all layers for these rows, and how conversions change outputs.
    """
    return max(1, min(JUDGES, JUDGE_TOKENS // length, rows // 4))


def draw(recipe: Recipe, donor: Donor, device: torch.device, on_progress: Listener) -> Rows:
    """The rows that `recipe` asks for, from text files, datasets, or sampled from the donor; held-out ones from each.

    Raises:
        CalibrationError: there is too little text.
        TextError: a text is missing or unreadable, or has a token that the donor has no embedding for.
    """
    calibration, length = recipe.calibration, row_length(recipe, donor.config)
    fit_rows = fitted_rows(recipe, donor.config, device)
    rows = fit_rows + calibration.held_out
    sampled = rows_to_sample(recipe, rows)
    tokenizer = donor.tokenizer()
    parts: list[Tensor] = []
    names: list[str] = []
    if rows > sampled:  # first, so that too little text is told before anything is sampled
        ids, names = text_rows(texts_of(recipe), tokenizer, rows - sampled, length, recipe.seed)
        parts.append(ids)
        require_embedded(parts[0], tokenizer, donor.config.vocab_size)
    if sampled:
        dtype = torch.float32 if device.type == "cpu" else donor.dtype
        texts, tokens = sampled_texts(recipe, donor.config)
        model = donor.model(device, dtype)
        ids = sampled_rows(model, tokenizer, sampled * texts, tokens, recipe.seed, on_progress)
        parts.append(ids.reshape(sampled, -1)[:, :length])
        names += ["self"] * sampled
    ids = torch.cat(parts)
    if len(parts) > 1:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(recipe.seed))
        ids, names = ids[order], [names[index] for index in order]
    held_out = _spread(names, calibration.held_out)
    fit = [index for index in range(rows) if index not in held_out]
    return Rows(ids[fit], ids[held_out], tuple(names[index] for index in held_out))


def _spread(names: Sequence[str], count: int) -> list[int]:
    """`count` rows, ascending, as many of each name as of the others where there are enough; the last ones of each.

    names: of the rows. The last row of a name is taken where there is no other.
    """
    left: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        left.setdefault(name, []).append(index)
    taken: list[int] = []
    while len(taken) < count:
        several = [rows for rows in left.values() if len(rows) > 1] or [
            rows for rows in left.values() if rows
        ]
        taken += [rows.pop() for rows in several[: count - len(taken)]]
    return sorted(taken)
