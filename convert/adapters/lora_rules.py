"""Rank and scale of peft's LoRA, and which of its variants are more than a product of two matrices."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from mhconvert.errors import AdapterError, UnsupportedError

from ..methods.hydra.settings import LARGEST_RANK
from ..validation.field_types import changed_fields, is_number, require_expression

# Fields of a LoRA config that choose modules, ranks and scales, or concern training only.
HARMLESS = {
    *(f.name for f in dataclasses.fields(PeftConfig)),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "runtime_config"),
}
PLAIN_STARTS = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # initialisations that leave base weights unchanged


def require_plain(config: LoraConfig, folder: Path) -> None:
    """Checks that the adapter is W + scale · B A, with usable ranks, scales and patterns.

    Raises:
        UnsupportedError: naming the field that makes it more than that.
        AdapterError: for a rank, scale or pattern that is no number or no expression.
    """
    for name in changed_fields(config):
        value = getattr(config, name)
        plain = name == "init_lora_weights" and value in PLAIN_STARTS
        if name not in HARMLESS and not plain:
            raise UnsupportedError(
                f"{folder} is a LoRA with {name}={value!r}, which is more than a product of two matrices; "
                "merge it with peft: PeftModel.merge_and_unload"
            )
    numbers = {"r": config.r, "lora_alpha": config.lora_alpha}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, dict):
            raise AdapterError(f"{folder}: {name}={patterns!r} is not numbers by module")
        numbers |= {f"{name}['{pattern}']": value for pattern, value in patterns.items()}
        for pattern in patterns:
            require_expression(pattern, name)
    for name, value in numbers.items():
        if not is_number(value):
            raise AdapterError(f"{folder}: {name}={value!r} is not a number")
        if name.startswith("r") and not (isinstance(value, int) and 1 <= value <= LARGEST_RANK):
            raise AdapterError(
                f"{folder}: {name}={value!r} is not a rank: a whole number from 1 to {LARGEST_RANK}"
            )
    for name in ("target_modules", "exclude_modules"):
        if isinstance(expression := getattr(config, name), str):
            require_expression(expression, name)


def lora_rank(config: Any, module: str) -> int:
    """The rank of one module, by peft's rules."""
    return int(config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r))


def lora_scale(config: Any, module: str, rank: int) -> float:
    """The scale of one module, alpha / r or alpha / √r, by peft's rules."""
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
