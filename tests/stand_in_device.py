"""A device without hardware: its tensors are held on the CPU, and what a real one refuses is refused.

An operation on tensors of two devices raises, and so does float64, which Apple's mps lacks.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "mps:0"
DEVICE = torch.device(NAME)
WIDE = (torch.float64, torch.complex128)
ATEN: Any = torch.ops.aten
# Operations that take tensors of two devices: copies between them, and indices on the CPU.
BETWEEN = (ATEN.copy_.default, ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default)

# Operations that name the device of a tensor which is not among their arguments: `x.to(other)`, `x[0] = 1`.
IMPLIED = (ATEN._to_copy.default, ATEN.scalar_tensor.default)


class OnDevice(Tensor):
    """A tensor of the device, with its values in `held` on the CPU."""

    held: Tensor
    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held.dtype in WIDE:
            raise TypeError(f"{NAME} has no {held.dtype}")
        made = (
            Tensor._make_wrapper_subclass(  # meta to torch's C++, which has no part for NAME in every build
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
            )
        )
        made.held = held
        return made

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class StandInDevice(TorchDispatchMode):
    """While it is active, `torch.device(NAME)` can be used; `operations` counts those that ran on it."""

    operations = 0

    def __enter__(self) -> StandInDevice:
        self._patched = pytest.MonkeyPatch()
        # torch's own makes its causal mask on no device
        self._patched.setattr(functional, "scaled_dot_product_attention", _attention)
        self._patched.setattr(torch, "Event", MagicMock())  # there is nothing to wait for
        for name in ("__enter__", "__exit__"):  # an inference tensor cannot be wrapped
            self._patched.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its values on the CPU, then moves them
        # Without it `module.to` makes new parameters, and tied ones come apart, as they do on no real device.
        torch.__future__.set_swap_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        self._patched.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(function, args, kwargs or {})
        self.operations += any(isinstance(leaf, OnDevice) for leaf in tree_leaves(result))
        return result


def _without_lists(index: Any) -> tuple[Any, ...]:
    """An index with tensors on the CPU for its lists, of which torch's C++ would make meta tensors without values."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, on the device of its arguments or on the one that it names."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    lost = any(tensor.is_meta for tensor in elsewhere)
    if here and (lost or (elsewhere and function not in BETWEEN)):
        raise RuntimeError(f"{function} of tensors on {NAME} and on the CPU")
    implied = bool(here) or function in IMPLIED
    asked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    on_device = asked[0] == DEVICE or (implied and asked[0].type == "meta") if asked else bool(here)
    if function is ATEN.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    known = {id(tensor.held): tensor for tensor in here}

    def held(value: Any) -> Any:
        if isinstance(value, torch.device) and on_device:
            return torch.device("cpu")
        return value.held if isinstance(value, OnDevice) else value

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not on_device:
            return value.clone() if id(value) in known else value
        return known[id(value)] if id(value) in known else OnDevice(value)

    if function is ATEN._conj.default:
        function = ATEN.conj_physical.default  # the lazy one sets a bit of `held` that is not seen in here
    plain_args, plain_kwargs = tree_map(held, (args, kwargs))
    return tree_map(placed, function(*plain_args, **plain_kwargs))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's function of this name computes, without dropout."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
