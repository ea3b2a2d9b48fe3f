"""Calibration rows, and the two streams of hidden states that pass through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CalibrationError
from mhconvert.progress import Listener

from ..donor.donor import Donor
from ..recipe.recipe import Recipe
from .documents import check_sources
from .token_rows import sampled_rows, text_rows

DEFAULT_ROW = 512  # tokens
JUDGES, JUDGE_TOKENS = 4, 2048  # rows and tokens, at most, on which a survey measures

# Tokens when the recipe does not say: text costs a forward pass, sampling one step for each token of a row.
DEFAULT_TOKENS = {
    ("text", "cpu"): {"quick": 8192, "default": 65536, "high": 131072},
    ("text", "cuda"): {"quick": 65536, "default": 131072, "high": 262144},
    ("self", "cpu"): {"quick": 4096, "default": 16384, "high": 65536},
    ("self", "cuda"): {"quick": 65536, "default": 131072, "high": 262144},
}


@dataclass(frozen=True)
class Rows:
    """Token ids (rows, length): `fit` is what the conversion sees, `held_out` what it is measured on."""

    fit: Tensor
    held_out: Tensor

    @property
    def all(self) -> Tensor:
        """Both, the fit's rows first."""
        return torch.cat((self.fit, self.held_out))


def token_count(recipe: Recipe, device: torch.device) -> int:
    """Calibration tokens of a run: the recipe's, or the default for its source, device and effort."""
    if recipe.calibration.tokens is not None:
        return recipe.calibration.tokens
    source = "self" if "self" in recipe.calibration.sources else "text"
    kind = "cpu" if device.type == "cpu" else "cuda"
    return DEFAULT_TOKENS[source, kind][recipe.effort]


def row_length(recipe: Recipe, config: Any) -> int:
    """Tokens in a calibration row: the recipe's, or DEFAULT_ROW where the donor reads that many."""
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_ROW
    return recipe.calibration.sequence_length or min(DEFAULT_ROW, limit)


def check(recipe: Recipe, config: Any) -> None:
    """Raises CalibrationError for settings that no text can satisfy, TextError for files that are not there."""
    part, length = recipe.calibration, row_length(recipe, config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise CalibrationError(
            f"sequence_length={length} is more than the donor reads; choose --sequence-length ≤ {limit}"
        )
    if length < 8:
        raise CalibrationError(f"sequence_length={length} is too short; use at least 8")
    if part.tokens is not None and part.tokens < length:
        raise CalibrationError(
            f"{part.tokens} calibration tokens do not fill one row of {length}; ask for more, or for "
            "shorter rows with --sequence-length"
        )
    if "self" in part.sources and len(part.sources) > 1:
        raise CalibrationError("calibration 'self' stands alone; leave it out to use files")
    if part.sources != ("self",):
        check_sources(part.sources)
    if part.held_out < 2:
        raise CalibrationError(f"held_out={part.held_out} rows measure nothing; use at least 2")


def judging_rows(length: int, rows: int) -> int:
    """How many of `rows` of `length` tokens a survey judges layers on: what each layer makes of them is kept."""
    return max(1, min(JUDGES, JUDGE_TOKENS // length, rows // 4))


def draw(recipe: Recipe, donor: Donor, device: torch.device, on_progress: Listener) -> Rows:
    """The rows that `recipe` asks for, from its files, dataset or the donor itself."""
    part, length = recipe.calibration, row_length(recipe, donor.config)
    fit = -(-token_count(recipe, device) // length)  # no fewer tokens than asked for
    wanted = fit + part.held_out
    tokenizer = donor.tokenizer()
    if part.sources == ("self",):
        dtype = torch.float32 if device.type == "cpu" else donor.dtype
        model = donor.model(device, dtype)
        ids = sampled_rows(model, tokenizer, wanted, length, recipe.seed, on_progress)
    else:
        ids = text_rows(part.sources, tokenizer, wanted, length, recipe.seed)
    if int(ids.max()) >= donor.config.vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token {int(ids.max())} and the donor's vocabulary has {donor.config.vocab_size}"
        )
    return Rows(ids[:fit], ids[fit:])
