"""The ranges of the numbers in a model's config: one table, asked before anything is built or allocated by them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import weight_names, weights_present
from .tensor_layout import STORED_DTYPES

SHOWN_CHARACTERS = 60
LARGEST = 1e30  # its products with weights and activations stay far inside float32


@dataclass(frozen=True)
class Range:
    """Which numbers a field may have; null always counts as "not stated", and is left to the config's class.

    Attributes:
        low, high: the bounds, which belong to it.
        above: whether `low` itself does not.
        whole: whether it is a count or an index.
        lists: whether the field may be a list of such numbers, or of lists of them.
    """

    low: float
    high: float = LARGEST
    above: bool = False
    whole: bool = False
    lists: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number in the range; a bool is none."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    @property
    def words(self) -> str:
        kind, low, high = "a number", f"{self.low:g}", f"{self.high:g}"
        if self.whole:
            kind, low, high = "a whole number", f"{self.low:,}", f"{self.high:,}"
        return f"{kind} above {low}, at most {high}" if self.above else f"{kind} from {low} to {high}"


def _whole(low: int, high: int, *, lists: bool = False) -> Range:
    return Range(low, high, whole=True, lists=lists)


POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
TOKEN = _whole(-1, (1 << 31) - 1)  # -1: none, in early configs
LENGTH = _whole(1, (1 << 31) - 1)
WIDTH = _whole(1, 1 << 20)
LAYERS = 4096  # several times the deepest model that is published

# By the names in config.json, also those of transformers 4 and of converted checkpoints. Bounds of sizes are far beyond
# every published model, and keep the number of elements of every tensor inside 64 bits.
RANGES: dict[str, Range] = {
    "vocab_size": _whole(1, 1 << 26),
    "hidden_size": WIDTH,
    "intermediate_size": _whole(1, 1 << 22),
    "moe_intermediate_size": _whole(1, 1 << 22),
    "shared_expert_intermediate_size": _whole(0, 1 << 22),
    "num_hidden_layers": _whole(1, LAYERS),
    "num_attention_heads": _whole(1, 1 << 14),
    "num_key_value_heads": _whole(1, 1 << 14),
    "head_dim": _whole(1, 1 << 16),
    "num_experts": _whole(0, 1 << 12),
    "num_local_experts": _whole(0, 1 << 12),
    "num_experts_per_tok": _whole(0, 1 << 12),
    "decoder_sparse_step": _whole(1, LAYERS),
    "mlp_only_layers": _whole(0, LAYERS, lists=True),
    "no_rope_layers": _whole(0, LAYERS, lists=True),
    "no_rope_layer_interval": _whole(1, LAYERS),
    "max_window_layers": _whole(0, LAYERS),
    "max_position_embeddings": LENGTH,
    "original_max_position_embeddings": LENGTH,
    "sliding_window": _whole(0, (1 << 31) - 1),  # 0: none
    "sliding_window_pattern": _whole(1, LAYERS),
    "_sliding_window_pattern": _whole(1, LAYERS),
    "rms_norm_eps": Range(0, 1, above=True),
    "layer_norm_eps": Range(0, 1, above=True),
    "norm_epsilon": Range(0, 1, above=True),
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "attention_multiplier": POSITIVE,
    "embedding_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "logit_scale": POSITIVE,
    "clip_qkv": POSITIVE,
    "swiglu_alpha": POSITIVE,
    "swiglu_limit": POSITIVE,
    "initializer_range": NOT_NEGATIVE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "router_jitter_noise": NOT_NEGATIVE,
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout"), SHARE),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop"), SHARE),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": Range(TOKEN.low, TOKEN.high, whole=True, lists=True),
    # RoPE, where transformers 4 and 5 have it
    "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE,
    "factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "attention_factor": POSITIVE,
    "mscale": NOT_NEGATIVE,
    "mscale_all_dim": NOT_NEGATIVE,
    "partial_rotary_factor": Range(0, 1, above=True),
    "short_factor": Range(0, above=True, lists=True),
    "long_factor": Range(0, above=True, lists=True),
    # converted checkpoints
    "kv_lora_rank": _whole(0, 1 << 20, lists=True),
    "qk_nope_head_dim": _whole(0, 1 << 20),
    "qk_rope_head_dim": _whole(0, 1 << 20),
    "v_head_dim": WIDTH,
    "rope_frequencies": _whole(0, 1 << 16, lists=True),
    "kv_code_counts": _whole(0, 1 << 20, lists=True),
    **dict.fromkeys(("k_head_map", "v_head_map", "k_fusion", "v_fusion"), _whole(0, 1 << 14, lists=True)),
    **dict.fromkeys(("shared_heads", "active_heads"), _whole(0, 1 << 14, lists=True)),
    **dict.fromkeys(("norm_scale", "norm_offset"), Range(-LARGEST, lists=True)),
    "softmax_scale": POSITIVE,
    "attention_softcap": POSITIVE,
}
PER_LAYER = (  # lists with an entry for each layer
    *("layer_types", "no_rope_layers", "kv_lora_rank", "rope_frequencies", "kv_code_counts"),
    *("k_head_map", "v_head_map", "shared_heads", "active_heads", "norm_scale", "norm_offset"),
)
ROPE = ("rope_parameters", "rope_scaling")  # mappings, or mappings of such by the type of layer
DEEPEST = 2  # a part of a part has no RoPE that is read
PARTS = ("text_config", "vision_config", "audio_config", "thinker_config", "speech_config")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in STORED_DTYPES)
LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")


def require_config(values: Mapping[str, Any], folder: Path) -> None:
    """Check `values`, of the config.json in `folder`: their ranges, and the layers against the weights beside it.

    Raises:
        CheckpointError: as `require_ranges` and `require_layers`, or for an unreadable index of the weights.
    """
    file = folder / "config.json"
    require_ranges(values, file)
    if weights_present(folder):
        require_layers(values.get("num_hidden_layers"), weight_names(folder), file)


def require_ranges(values: Mapping[str, Any], file: Path, names: Mapping[str, str] | None = None) -> None:
    """Check the fields of a config, and those of its RoPE and of the parts of a multimodal one.

    Args:
        file: that states them, for messages.
        names: field -> its name in `file`, where that is another.

    Raises:
        CheckpointError: with the field, its value and what it may be.
    """
    for field, value, allowed in _faults(values, ""):
        text = json.dumps(value, default=str)
        text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
        raise CheckpointError(f"{file}: {(names or {}).get(field, field)}={text} is not {allowed}")


def require_layers(count: Any, names: Iterable[str], file: Path) -> None:
    """Raises CheckpointError where a config of `count` layers has more than the tensors `names`, which say how many."""
    numbers = [int(found[1]) for name in names if (found := LAYER.search(name))]
    if numbers and isinstance(count, int) and count > (stored := max(numbers) + 1):
        raise CheckpointError(
            f"{file} says that there are {count} layers, and its weights have tensors of {stored}; "
            "download the checkpoint again, or correct the number"
        )


def _faults(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, str]]:
    """(field with its place, value, what it may be) of everything that is out of range in one mapping and below it."""
    for name, value in values.items():
        field = f"{place}{name}"
        if value is None:
            continue
        if name in RANGES:
            yield from _number_faults(field, value, RANGES[name])
        elif name in (*ROPE, *PARTS):
            if not isinstance(value, Mapping):
                yield field, value, "a mapping of settings"
            elif field.count(".") < DEEPEST:
                yield from _faults(value, f"{field}.")
        elif isinstance(value, Mapping) and place.endswith(tuple(f"{rope}." for rope in ROPE)):
            yield from _faults(value, f"{field}.")  # of one type of layer
        elif name in ("dtype", "torch_dtype"):
            if not (isinstance(value, str) and value.removeprefix("torch.") in DTYPES):
                yield field, value, f"one of {', '.join(DTYPES)}"
        elif name == "architectures":
            if not (isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)):
                yield field, value, "a list of names of classes"
        elif isinstance(value, float) and not math.isfinite(value):
            yield field, value, "a finite number"
    yield from _unfitting(values, place)


def _number_faults(field: str, value: Any, allowed: Range) -> Iterator[tuple[str, Any, str]]:
    if not (allowed.lists and isinstance(value, list)):
        if not allowed.holds(value):
            yield field, value, allowed.words
        return
    for index, entry in enumerate(value):
        inner = entry if isinstance(entry, list) else [entry]
        for number in inner:
            if not allowed.holds(number):
                yield f"{field}[{index}]", number, allowed.words


def _unfitting(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, str]]:
    """Fields of one mapping, each in its range, that do not go with another of it."""
    layers = values.get("num_hidden_layers")
    for name in PER_LAYER if isinstance(layers, int) else ():
        stated = values.get(name)
        if isinstance(stated, list) and len(stated) != layers:
            yield f"{place}{name}", stated, f"a list with an entry for each of {layers} layers"
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        yield f"{place}high_freq_factor", high, f"above low_freq_factor={low}"
    experts, chosen = (
        values.get("num_local_experts", values.get("num_experts")),
        values.get("num_experts_per_tok"),
    )
    if experts and chosen is not None and not 1 <= chosen <= experts:
        yield (
            f"{place}num_experts_per_tok",
            chosen,
            f"a whole number from 1 to {experts}, the number of experts",
        )
