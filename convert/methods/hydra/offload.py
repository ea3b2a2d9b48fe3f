"""Layers whose weights accelerate keeps in main memory or on disk until they compute."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from torch import nn


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings in an offloaded module's weights; None for a module that stays where it is."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


def keep_in_memory(module: nn.ParameterDict) -> None:
    """Bring in the matrices of `module`, for good, where its layer computes.

    Nobody calls a ParameterDict, so no hook would run; and one whose hook knows some of its matrices takes no more.
    """
    hook = hook_of(module)
    if hook is None:
        return
    _mend_index(module, hook.weights_map)
    hook.pre_forward(module)
    hook.offload = False


def _mend_index(module: nn.ParameterDict, weights: Any) -> None:
    """Make the matrices of `module` findable on disk.

    peft files an adapter's tensors as if each were the weight of a module, which LoRA's are: the matrix
    `o_proj.hydra_par_A.NAME` lies under `o_proj.NAME.hydra_par_A`.
    """
    if not isinstance(getattr(weights, "dataset", None), OffloadedWeightsLoader):
        return
    index, (layer, _, matrices) = weights.dataset.index, weights.prefix.rstrip(".").rpartition(".")
    for name in module:
        filed = f"{layer}.{name}.{matrices}"
        if filed in index:
            index.setdefault(f"{weights.prefix}{name}", index[filed])
