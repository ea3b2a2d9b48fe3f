"""The table of families and methods, from the families' data and the methods' checks."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from ..families.facts import FAMILIES, Family, attention_facts, rope_settings
from . import registry
from .method_info import MethodInfo
from .refusals import OTHER_FIELDS, QK_NORM_FIELDS, refusals

EXPERT_FIELDS = ("num_experts", "num_local_experts")
NOTES = """\
exact: at full rank (mla with kv_bits 16), or with all heads, the converted model is its donor
(mla/test_families_exact.py and dha/test_identity.py; moh, to the bit: moh/test_modeling.py, all in
tests/convert/methods); below it every family is approximate. mla, exact + n: the cache also holds n numbers 1/RMS of
a token's keys (G: one a KV head), which count against the budget, so that a budget of 1 is a little short of full
rank. RoPE types default, linear, llama3 and yarn are carried over; dynamic and longrope are refused in every family.
swa: exact where no layer is windowed, in a stock class of transformers where one has a type for each layer of the
family (swa/test_targets.py there), else with --sinks first (swa/test_first_tokens.py). mla+swa: as mla with codes, near
its donor at 8 bits where no layer is windowed (mla/test_coded_modeling.py and mla/test_coded_window.py). hybrid: a
linear layer is never its donor's; donors whose layers have windows are refused, and the table is of the families'
default configs: a Mistral without one is taken.
hydra: a new adapter changes nothing, and one that is merged computes what it computed beside its base; its targets
are linear modules, which experts are not. Families that only hydra takes open, are measured and merge with adapters."""


def family_table() -> list[dict[str, Any]]:
    """One row per family. Reads no model.

    Returns:
        Of each family: family, methods {name: "exact", "exact + n", "approximate" or "refused: …"}, carried
        (its special features that conversions keep), refused (fields of its config that are refused where they are
        set).
    """
    return [_row(row, CONFIG_MAPPING[name]()) for name, row in sorted(FAMILIES.items())]


def markdown(table: list[dict[str, Any]]) -> str:
    """`table` in Markdown, with numbered reasons of refusals and an explanation of its words."""
    methods = list(table[0]["methods"])
    reasons: list[str] = []

    def cell(verdict: str) -> str:
        word, _, reason = verdict.partition(": ")
        if reason and reason not in reasons:
            reasons.append(reason)
        return f"{word} ({reasons.index(reason) + 1})" if reason else word

    lines = [["family", *methods, "carried over", "refused by name"], ["---"] * (len(methods) + 3)]
    for row in table:
        verdicts = [cell(row["methods"][name]) for name in methods]
        lines.append([row["family"], *verdicts, "; ".join(row["carried"]), ", ".join(row["refused"])])
    cells = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    numbered = "\n".join(f"({n}) {reason}" for n, reason in enumerate(reasons, 1))
    return f"{cells}\n\n{numbered}\n\n{NOTES}"


def _row(family: Family, config: Any) -> dict[str, Any]:
    verdicts = {name: reason and f"refused: {reason}" for name, reason in refusals(config).items()}
    cached = {None: "", "head": " + G", "width": " + 1"}[family.qk_norm]
    return {
        "family": family.model_type,
        "methods": {
            name: verdict or _held(registry.info(name), cached) for name, verdict in verdicts.items()
        },
        "carried": _carried(family, config),
        "refused": [name for name in (*QK_NORM_FIELDS, *OTHER_FIELDS) if hasattr(config, name)],
    }


def _held(info: MethodInfo, cached: str) -> str:
    """What a method makes of a family that it does not refuse; cached: of the keys, beside the latent."""
    if not info.exact:
        return "approximate"
    return f"exact{cached}" if info.caches_key_scales else "exact"


def _carried(family: Family, config: Any) -> list[str]:
    """The features of a family's attention beside grouped queries and RoPE over whole heads."""
    bases = {rope.get("rope_theta") for rope in rope_settings(config)}
    features = {
        "biases": family.input_bias or family.output_bias,
        "QK-norm over a head": family.qk_norm == "head",
        "QK-norm over the width": family.qk_norm == "width",
        "sliding windows": family.window,
        "a RoPE base for each type of layer": len(bases) > 1,
        "soft-caps": family.softcap,
        "partial RoPE": family.partial_rotary,
        "a softmax scale of its own": attention_facts(config).scale
        != attention_facts(config).head_dim ** -0.5
        or hasattr(config, "query_pre_attn_scalar"),
        "no norm before the attention": family.attention_norm is None,
        "experts (untouched)": any(hasattr(config, name) for name in EXPERT_FIELDS),
    }
    return [feature for feature, present in features.items() if present]
