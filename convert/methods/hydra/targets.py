"""The modules that an adapter is put on: defaults by model type, and checks of the names that a user gives."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from mhconvert.errors import AdapterError

# The projections that write to the residual stream: their outputs are what a sequential branch re-mixes.
_BLOCK = ["o_proj", "down_proj"]
_ATTENTION = ["o_proj"]  # the experts of these are one parameter for all, not linear modules
DEFAULT_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(("arcee", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral"), _BLOCK),
    **dict.fromkeys(("mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss"), _BLOCK),
    **dict.fromkeys(("granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), _ATTENTION),
    **dict.fromkeys(("cohere", "cohere2", "ernie4_5", "glm", "glm4", "smollm3", "stablelm"), _BLOCK),
    **dict.fromkeys(("cwm", "granite_swa"), _BLOCK),
    "gpt_oss": _ATTENTION,
    "starcoder2": ["o_proj", "c_proj"],
}
NEAREST = 5


def require_match(wanted: Any, model: nn.Module) -> None:
    """Checks that target_modules match a module's name; warns of single names of a list that match none.

    Args:
        wanted: target_modules, a list of names or an expression.
    Raises:
        AdapterError: where nothing matches.
    """
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        if not means_all(wanted) and not any(re.fullmatch(wanted, name) for name in names):
            reason = "a string is an expression for whole names, a list holds names or their ends"
            raise AdapterError(f"{nothing_matches([wanted], model)}; {reason}")
        return
    missing = unmatched(wanted or (), model)
    if missing and len(missing) == len(wanted):
        raise AdapterError(nothing_matches(missing, model))
    if missing:
        warnings.warn(nothing_matches(missing, model), stacklevel=2)


def means_all(wanted: Any) -> bool:
    """Whether target_modules are "all-linear", peft's word for every linear module but the head."""
    return isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def unmatched(wanted: Iterable[str], model: nn.Module) -> list[str]:
    """Those of the names `wanted` that are no module's name in `model`, nor the end of one."""
    ends = {end for name, _ in model.named_modules() for end in _ends(name)}
    return sorted(set(wanted) - ends - set(DUMMY_TARGET_MODULES))


def nothing_matches(targets: list[str], model: nn.Module) -> str:
    """The message that `targets` match no module of `model`, with the nearest names of linear modules."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    last = sorted({name.rpartition(".")[2] for name in linear} - {"base_layer"})
    ends = sorted({end for name in linear for end in _ends(name)})
    near = [name for target in targets for name in difflib.get_close_matches(target, ends, NEAREST, 0.5)]
    nearby = (list(dict.fromkeys(near)) or last)[:NEAREST]
    named = ", ".join(f"'{target}'" for target in targets)
    hint = (
        f"the nearest names of linear modules are {', '.join(nearby)}"
        if nearby
        else "it has no linear module"
    )
    return f"target_modules {named} match nothing in {type(model).__name__}: {hint}"


def require_linear(module: nn.Module, name: str, quantised: bool) -> None:
    """Raises AdapterError naming the module unless Hydra can be put on it."""
    if isinstance(module, BaseTunerLayer):
        raise AdapterError(
            f"target module '{name}' has an adapter of another method ({type(module).__module__}), which merging would "
            "leave out; merge that one first: merge_and_unload"
        )
    kind = type(module).__name__
    if isinstance(module, Conv1D):
        kind, hint = "Conv1D", "whose weight lies transposed"
    elif isinstance(module, nn.Embedding):
        hint = "which looks rows up and computes no product"
    elif kind == "NonDynamicallyQuantizableLinear":
        hint = "whose weight nn.MultiheadAttention uses without calling it"
    elif isinstance(module, nn.Linear) or quantised:
        return
    else:
        hint = "not a linear layer"
    raise AdapterError(f"target module '{name}' is a {kind}, {hint}; Hydra adapts torch.nn.Linear")


def is_tied_head(module: nn.Module, model: Any) -> bool:
    """Whether `module` is the output head of `model`, which its config ties to the input embedding."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    try:
        return module is model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # a model without
        return False


def holders(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter of `model`, all names that it has."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return by_id


def require_unshared(module: nn.Module, name: str, held: dict[int, list[str]]) -> None:
    """Checks that no other module holds a parameter of `module`.

    Args:
        held: what `holders` returns for the model.
    Raises:
        AdapterError: naming the other module.
    """
    for kind, parameter in module.named_parameters():
        others = [other for other in held[id(parameter)] if other != f"{name}.{kind}"]
        if others:
            raise AdapterError(
                f"target module '{name}' shares its {kind} with {others[0]}, which merging would change as well; leave "
                "it out, or give it a tensor of its own"
            )


def outside_tuners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name, except those inside an adapted layer."""
    inside = None  # named_modules goes depth first
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside = f"{name}."


def _ends(name: str) -> list[str]:
    """ "a.b.c" -> "a.b.c", "b.c", "c"."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]
