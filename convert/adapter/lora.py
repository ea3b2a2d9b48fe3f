"""What must be known of peft's LoRA to merge one: its scale, and the variants that are more than B A."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from mhconvert.convert.errors import UnsupportedError
from mhconvert.convert.fields import changed_fields

# Fields of a LoRA config that choose modules, ranks and scales, or concern training only.
HARMLESS = {
    *(f.name for f in dataclasses.fields(PeftConfig)),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "runtime_config"),
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # these leave the base weights as they are


def require_plain(config: LoraConfig, folder: Path) -> None:
    """Raises UnsupportedError naming the field where the adapter is more than W + scale · B A."""
    for name in changed_fields(config):
        value = getattr(config, name)
        plain = name == "init_lora_weights" and value in PLAIN_STARTS
        if name not in HARMLESS and not plain:
            raise UnsupportedError(
                f"{folder} is a LoRA with {name}={value!r}, which is more than a product of two matrices; "
                "merge it with peft: PeftModel.merge_and_unload"
            )


def lora_scale(config: Any, module: str, rank: int) -> float:
    """alpha / r of one module, or alpha / √r, as peft takes them."""
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
