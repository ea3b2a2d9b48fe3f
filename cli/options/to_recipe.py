"""The options that a conversion and a curve share, made into a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from ...convert.methods.registry import ADAPTERS, settings_class

SIZES = ("kv_budget", "kv_lora_rank", "qk_rope_head_dim")
HEADS = ("uniform", "regroup", "min_heads", "max_heads", "head_multiple", "plan", "fusion")
ROUTING = ("active", "shared", "router", "shared_heads", "route")
METHOD_OPTIONS = (*SIZES, "profile", *HEADS, *ROUTING, "r_par", "r_seq", "targets", "scale", "dropout")
OF_THE_PASS: dict[str, Any] = {  # what an adapter has no use for, and its value when it is not given
    "tolerance": None,
    "effort": "default",
    "fit_steps": None,
    "calibration": None,
    "calibration_tokens": None,
    "sequence_length": None,
    "dtype": None,
    "device": None,
    "max_shard_size": "5GB",
    "no_verify": False,
    "heal": None,
    "resume": False,
    "survey": False,
}
SAME = ("effort", "fit_steps", "seed", "dtype", "device", "trust_remote_code")  # named alike in the recipe


def method_options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's own options that have a value. Raises BadParameter for one that the method does not have,
    and for two ways to say one thing."""
    chosen = {name: given[name] for name in METHOD_OPTIONS if given.get(name) is not None}
    if method in ADAPTERS:
        chosen |= {
            name: given[name] for name, value in OF_THE_PASS.items() if given.get(name, value) != value
        }
    sizes = set(SIZES) & chosen.keys()
    if "kv_budget" in sizes and len(sizes) > 1:
        raise typer.BadParameter("give --kv-budget, or --kv-lora-rank and --qk-rope-head-dim, but not both")
    if "kv_budget" in sizes and "plan" in chosen:
        raise typer.BadParameter("give --kv-budget, or the heads of every layer by --plan, but not both")
    if sizes and given.get("tolerance") is not None:
        raise typer.BadParameter("give --tolerance, or a budget or sizes, but not both")
    for name in chosen.keys() - {field.name for field in dataclasses.fields(settings_class(method))}:
        raise typer.BadParameter(f"--{name.replace('_', '-')} does not apply to {method}")
    if "targets" in chosen:
        chosen["targets"] = tuple(word.strip() for word in chosen["targets"].split(","))
        if not all(chosen["targets"]):
            raise typer.BadParameter(f"--targets '{given['targets']}' has an empty name")
    return chosen


def recipe_of(given: dict[str, Any], settings: dict[str, Any], **others: Any) -> Any:
    """The recipe of a command's arguments `given`; `others` are fields that only that command has."""
    from ...convert.recipe.recipe import Calibration, Recipe

    sources = tuple(given["calibration"] or ("self",))
    return Recipe(
        model=given["donor"],
        method=given["to"],
        settings=settings_class(given["to"])(**settings),
        calibration=Calibration(sources, given["calibration_tokens"], given["sequence_length"]),
        **{name: given[name] for name in SAME},
        **others,
    )
