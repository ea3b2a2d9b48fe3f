"""Layers whose weights accelerate keeps in main memory or on disk until they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from torch import nn


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings in an offloaded module's weights; None for a module that stays where it is."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


@contextmanager
def loaded(dicts: list[nn.ParameterDict]) -> Iterator[None]:
    """Offloaded ParameterDicts, in memory for as long as the context lasts: nobody calls them, so no hook runs."""
    for module in dicts:
        if (hook := hook_of(module)) is not None:
            hook.pre_forward(module)
    yield
    for module in dicts:
        if (hook := hook_of(module)) is not None:
            hook.post_forward(module, None)


def mend_index(module: nn.ParameterDict) -> None:
    """Make the matrices of `module` findable on disk.

    peft files an adapter's tensors as if each were the weight of a module, which LoRA's are: the matrix
    `o_proj.hydra_par_A.NAME` lies under `o_proj.NAME.hydra_par_A`.
    """
    hook = hook_of(module)
    weights: Any = hook.weights_map if hook is not None else None
    if weights is None or not isinstance(getattr(weights, "dataset", None), OffloadedWeightsLoader):
        return
    index, (layer, _, matrices) = weights.dataset.index, weights.prefix.rstrip(".").rpartition(".")
    for name in module:
        filed = f"{layer}.{name}.{matrices}"
        if filed in index:
            index.setdefault(f"{weights.prefix}{name}", index[filed])
