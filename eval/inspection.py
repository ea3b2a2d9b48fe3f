"""`mhconvert inspect`: a model's attention, the size of its cache, and which methods apply. Reads configs only."""

from __future__ import annotations

from typing import Any

import torch

from mhconvert.errors import CheckpointError, MhconvertError

from ..convert import open_model
from ..convert.checkpoint import chain, identity
from ..convert.checkpoint.identity import converted_method
from ..convert.donor.donor import Donor, open_donor
from ..convert.families import facts as family_facts
from ..convert.layer_pass import cost_estimate
from ..convert.methods import refusals
from ..convert.methods.cache_elements import cache_elements, head_dim, kv_heads
from ..convert.methods.hybrid_mla.states import state_bytes
from ..convert.methods.mla.latent_code import row_bytes
from ..convert.methods.registry import ADAPTERS, build_method
from ..convert.methods.swa.window_plan import held_tokens
from ..convert.open_model import read_config
from ..convert.recipe.recipe import Recipe

CONTEXTS = (8_192, 32_768, 131_072)


def inspect(reference: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What is known of the model `reference` from its config, as plain JSON types.

    Returns:
        model_type, converted_by, dtype; chain: the methods of the steps that made it; first_donor: what they began with
            (None for a donor); attention: see `attention`; kv: elements_per_token, bytes_per_token and bytes
        by context length, at the stored dtype; methods: name -> applies, and reason or kv_bytes_per_token (for an
        adapter trainable_parameters) and output_bytes.

    Raises:
        CheckpointError: the config lacks a value.
    """
    folder = open_model.checkpoint_folder(reference, weights=False)
    made_by = converted_method(str(folder))
    donor = open_donor(reference, trust_remote_code=trust_remote_code)
    if folder is None or made_by is None:
        config, dtype = donor.config, donor.dtype
    else:
        config = read_config(str(folder), made_by)
        dtype = _torch_dtype(config.dtype)
    try:
        layers, facts = cache_elements(config), attention(config)
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{reference}/config.json is not whole: {error}") from error
    elements, states = sum(layers), all_state_bytes(config, dtype)
    return {
        "reference": reference,
        "notice": donor.notice,
        "model_type": config.model_type,
        "converted_by": made_by or identity.made_by(reference),
        "chain": [step.get("method") for step in chain.steps(donor.folder)],
        "first_donor": chain.first_model(donor.folder),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": facts,
        "kv": {
            "elements_per_token": elements,
            "bytes_per_token": elements * dtype.itemsize,
            "bytes": {
                str(length): sum(e * n for e, n in zip(layers, cached_tokens(config, length), strict=True))
                * dtype.itemsize
                + states
                for length in CONTEXTS
            },
        },
        "methods": _methods(donor, config),
    }


def cached_tokens(config: Any, length: int) -> list[int]:
    """(layers,), the tokens of a text of `length` that each layer's cache holds, by the windows of our own classes."""
    text = config.get_text_config()
    windows = getattr(text, "kv_windows", None) or [None] * text.num_hidden_layers
    return [held_tokens(window, length) for window in windows]


def all_state_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the states of linear layers, for a text of any length."""
    text = config.get_text_config()
    linear = getattr(text, "linear_layers", None) or ()
    return len(linear) * state_bytes(text.num_attention_heads, head_dim(text), dtype.itemsize)


def attention(config: Any) -> dict[str, Any]:
    """Heads, widths and RoPE of the attention, by the names of the config's fields."""
    text = config.get_text_config()
    facts: dict[str, Any] = {
        "num_hidden_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
    }
    found = [describe(text) for field, describe in KINDS if getattr(text, field, None) is not None]
    for part in found or [_heads(text)]:
        kinds = [facts["kind"]] if "kind" in facts else []
        facts |= part | {"kind": " and ".join([*kinds, part["kind"]])}
    if getattr(text, "kv_windows", None) is not None:
        facts["kv_windows"] = [window or "full" for window in text.kv_windows]
    own = [family_facts.layer_window(text, index) for index in range(text.num_hidden_layers)]
    if any(own):
        facts["sliding_window"] = _one_or_all([window or "full" for window in own])
    rope = family_facts.rope_settings(text)[0]
    facts["rope_type"], facts["rope_theta"] = rope.get("rope_type", "default"), rope.get("rope_theta")
    facts["max_position_embeddings"] = getattr(text, "max_position_embeddings", None)
    return facts


def _latents(text: Any) -> dict[str, Any]:
    layers = range(text.num_hidden_layers)
    return {
        "kind": "latent (MLA)",
        "kv_lora_rank": _one_or_all([text.latent_rank(i) for i in layers]),
        "qk_rope_head_dim": _one_or_all([2 * len(text.layer_frequencies(i)) for i in layers]),
        "qk_nope_head_dim": _one_or_all([text.nope_width(i) for i in layers]),
        "v_head_dim": text.v_head_dim,
    }


def _codes(text: Any) -> dict[str, Any]:
    coded = [counts for counts in text.kv_code_counts if any(counts)]  # linear layers have none
    facts = {
        "kind": "coded latents (MLA)",
        "head_dim": head_dim(text),
        "num_key_value_heads": kv_heads(text),
        "kv_lora_rank": _one_or_all([sum(counts) for counts in coded]),
        "kv_code_bytes": _one_or_all([row_bytes(counts) for counts in coded]),
    }
    if not getattr(text, "linear_layers", None):
        return facts
    return facts | {
        "kind": f"{text.linear_mixer} in some layers, coded latents (MLA) in the others",
        "linear_layers": ", ".join(map(str, text.linear_layers)),
    }


def _fewer_heads(text: Any) -> dict[str, Any]:
    maps = [text.head_maps(i) for i in range(text.num_hidden_layers)]
    return {
        "kind": "decoupled heads (DHA)",
        "head_dim": head_dim(text),
        "k_heads": _one_or_all([max(k) + 1 for k, _ in maps]),
        "v_heads": _one_or_all([max(v) + 1 for _, v in maps]),
    }


def _routed(text: Any) -> dict[str, Any]:
    chained = any(getattr(text, field, None) is not None for field, _ in KINDS[:-1])
    heads = {} if chained else {"head_dim": head_dim(text), "num_key_value_heads": kv_heads(text)}
    return {
        "kind": "mixture of heads (MoH)",
        **heads,
        "routed": f"{text.head_route}, by {text.head_router}",
        "active_heads": _one_or_all(list(text.active_heads)),
        "shared_heads": _one_or_all([len(heads) for heads in text.shared_heads]),
    }


def _heads(text: Any) -> dict[str, Any]:
    heads, groups = text.num_attention_heads, kv_heads(text)
    kind = "multi-head" if heads == groups else "multi-query" if groups == 1 else "grouped-query"
    return {"kind": kind, "num_key_value_heads": groups, "head_dim": head_dim(text)}


# Field of a config -> what is said of attention that has it; a chain of conversions may have several.
KINDS = (
    ("rope_frequencies", _latents),
    ("kv_code_counts", _codes),
    ("k_head_map", _fewer_heads),
    ("shared_heads", _routed),
)


def _methods(donor: Donor, config: Any) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {}
    for name, reason in refusals.refusals(config).items():
        methods[name] = {"applies": False, "reason": reason}
        if reason is not None:
            continue
        try:
            recipe = Recipe(model=donor.reference, method=name)
            chain.require_donor(donor.folder, recipe)
            if name in ADAPTERS:
                methods[name] = {"applies": True} | _adapter(donor, name)
                continue
            method = build_method(name, config, recipe.settings, recipe.effort)
            plan = cost_estimate.plan(recipe, donor, method, torch.device("cpu"))
        except MhconvertError as error:
            methods[name]["reason"] = str(error)
            continue
        cost = plan["kv_bytes_per_token"]["converted"]
        methods[name] = {"applies": True, "kv_bytes_per_token": cost, "output_bytes": plan["output_bytes"]}
    return methods


def _adapter(donor: Donor, method: str) -> dict[str, Any]:
    """Trainable parameters and size of an adapter with default settings."""
    from ..convert.adapters import create

    plan = create.describe(Recipe(model=donor.reference, method=method))
    return {"trainable_parameters": plan["parameters"]["trainable"], "output_bytes": plan["output_bytes"]}


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _torch_dtype(dtype: Any) -> torch.dtype:
    """A config's dtype, which may be a torch dtype, its name, or absent (float32)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, str(dtype or "float32"), None)
    if not isinstance(named, torch.dtype):
        raise MhconvertError(f"dtype '{dtype}' in config.json is not one that torch has")
    return named
