"""Which class holds a donor with some of its layers windowed: stock ones of transformers and what each cannot hold, and
ours for any donor.

A class holds a donor exactly if its weights, copied under the same names, compute the donor's logits when no layer is
windowed; tests/convert/methods/swa/test_targets.py checks every row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import UnsupportedError

from ...families.facts import attention_facts, class_free_values, layer_window, rope_settings

NO_SINK = -1e4  # as a sink's logit: exp of it is 0 in every dtype, and no infinity meets another
Lacks = Callable[[Any], str | None]


@dataclass(frozen=True)
class Target:
    """A class with a type for each layer, full or windowed.

    Attributes:
        model_type: of transformers.
        donors: families whose blocks it has, apart from windows and sinks.
        sinks: whether each head has a logit `self_attn.sinks`.
        keeps_first: whether windowed layers keep the first tokens, which our class does.
        lacks: the feature of a donor's config that it does not hold; None: it holds all.
        extra: fields of its config that a donor's lacks, or has with another meaning.
    """

    model_type: str
    donors: tuple[str, ...]
    sinks: bool = False
    keeps_first: bool = False
    lacks: Lacks = lambda config: None
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}


def _no_cwm(config: Any) -> str | None:
    reasons = {
        "attention_bias=True: its q, k, v and o have no biases": getattr(config, "attention_bias", False),
        "eos_token_id is missing, and it would take one of its own": config.eos_token_id is None,
        "bos_token_id is missing, and it would take one of its own": config.bos_token_id is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _one_rope(config: Any) -> str | None:
    """Why a layer that becomes windowed would get another RoPE, in classes that have one for each type of layer."""
    ropes = rope_settings(config)
    if any(rope != ropes[0] for rope in ropes):
        bases = " and ".join(f"{rope.get('rope_theta'):g}" for rope in ropes)
        return f"its full and its windowed layers have a RoPE each (bases {bases}): a windowed layer would change it"
    return None


def _switched_on(config: Any) -> dict[str, Any]:
    return {"use_sliding_window": True}


def _rope_of_each(config: Any) -> dict[str, Any]:
    """The donor's RoPE for both types of layer."""
    kinds = ("full_attention", "sliding_attention")
    return {"rope_parameters": {kind: copy.deepcopy(rope_settings(config)[0]) for kind in kinds}}


def _granite(config: Any) -> dict[str, Any]:
    """Granite's multipliers, which other families do not have, and the biases of all four maps."""
    facts = attention_facts(config)
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    multipliers = {name: getattr(config, name, 1.0) for name in names}
    biased = facts.input_bias or facts.output_bias
    return multipliers | {"attention_multiplier": facts.scale, "attention_bias": biased}


# In the order in which they are tried.
TARGETS = (
    Target("cwm", ("llama",), lacks=_no_cwm),
    Target("ministral", ("mistral", "ministral")),
    Target("qwen2", ("qwen2",), extra=_switched_on),
    Target("qwen2_moe", ("qwen2_moe",), extra=_switched_on),
    Target("qwen3", ("qwen3",), extra=_switched_on),
    Target("gemma2", ("gemma2",)),
    Target("gemma3_text", ("gemma3_text",), lacks=_one_rope),
    Target("olmo3", ("olmo2",), extra=_rope_of_each),
    Target("olmo3", ("olmo3",), lacks=_one_rope),
    Target("granite_swa", ("llama", "mistral", "ministral", "granite", "qwen2"), sinks=True, extra=_granite),
)


def unheld(config: Any) -> str | None:
    """Why no stock class holds a donor with `config` when some layers are windowed; None: one does."""
    reasons = {row.model_type: row.lacks(config) for row in TARGETS if config.model_type in row.donors}
    if not reasons:
        return f"no stock class of transformers has a type for each layer of a {config.model_type} model"
    if all(reasons.values()):
        return "; ".join(f"{name} does not hold it: {reason}" for name, reason in reasons.items())
    return None


def target_for(config: Any, sinks: str | None, windowless: bool = False) -> Target:
    """The class for a donor.

    Args:
        sinks: "learnt", "first", "none", or None: of learnt, none and first the foremost that a class holds it with.
        windowless: whether no layer is windowed, so that there is nothing for sinks to mend.

    Raises:
        UnsupportedError: no class holds the donor with those sinks.
    """
    rows = [row for row in TARGETS if config.model_type in row.donors and not row.lacks(config)]
    with_sinks = [row for row in rows if row.sinks]
    if sinks == "first" or (sinks is None and not rows):
        return Target(f"swa_{config.model_type}", (config.model_type,), keeps_first=True)
    if not rows:
        raise UnsupportedError(f"sinks={sinks} needs a stock class: {unheld(config)}; choose --sinks first")
    if sinks == "learnt" and not with_sinks:
        facts = attention_facts(config)
        norm = f", and {config.model_type} has a norm of queries and keys" if facts.qk_norm else ""
        raise UnsupportedError(
            f"sinks=learnt needs granite_swa, whose blocks are not those of a {config.model_type} model{norm}; "
            "choose --sinks first, or none"
        )
    learns = with_sinks and sinks != "none" and not (windowless and sinks is None)
    return with_sinks[0] if learns else rows[0]


def own_windows(config: Any) -> list[int | None]:
    """The window of each of the donor's layers; None: it sees the whole text."""
    return [layer_window(config, index) for index in range(config.num_hidden_layers)]


def windowed_config(config: Any, target: Target, windows: list[int | None]) -> Any:
    """The configuration of a stock `target` for a donor with `config` whose layers have `windows`, all of one width."""
    from transformers import CONFIG_MAPPING

    width = next((window for window in windows if window), None)
    values = class_free_values(config) | {
        "head_dim": attention_facts(config).head_dim,
        "sliding_window": width,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
    if target.model_type == "cwm":
        values.pop("attention_bias", None)  # it has no such field
    if width is None:
        values["sliding_window"] = 1  # no layer reads it; classes that switch windows by it take a number
    made = CONFIG_MAPPING[target.model_type](**values | target.extra(config))
    made._attn_implementation = "eager" if target.sinks or attention_facts(config).softcap else "sdpa"
    return made
