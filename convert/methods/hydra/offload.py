"""Layers whose weights accelerate keeps in main memory or on disk until they compute."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from torch import nn


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook that loads an offloaded module's weights; None for a module that is not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


def keep_in_memory(module: nn.ParameterDict) -> None:
    """Load the matrices of `module` to the device that its layer computes on, and keep them there.

    accelerate's hook would never run, since a ParameterDict is not called, and it would not know of later matrices.
    """
    hook = hook_of(module)
    if hook is None:
        return
    _add_to_index(module, hook.weights_map)
    hook.pre_forward(module)
    hook.offload = False


def _add_to_index(module: nn.ParameterDict, weights: Any) -> None:
    """Add the names of the matrices of `module` to accelerate's index of offloaded weights.

    peft indexes an adapter's tensors as if each were the weight of a module, as LoRA's are: the matrix
    `o_proj.hydra_par_A.NAME` has the key `o_proj.NAME.hydra_par_A`.
    """
    if not isinstance(getattr(weights, "dataset", None), OffloadedWeightsLoader):
        return
    index, (layer, _, matrices) = weights.dataset.index, weights.prefix.rstrip(".").rpartition(".")
    for name in module:
        key = f"{layer}.{name}.{matrices}"
        if key in index:
            index.setdefault(f"{weights.prefix}{name}", index[key])
