"""A forward pass that keeps less for its backward pass: not what takes next to no time to compute again.

Under autocast a product with a frozen weight keeps a 16-bit copy of the weight, one with a trained weight a copy of its
input, and a gated MLP keeps the output of its activation beside both factors. Here an input is cast once for all its
products, and copies of weights and outputs of activations are computed again in the backward pass, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

ACTIVATIONS = (F.silu, F.gelu)


@contextmanager
def lean_forward() -> Iterator[None]:
    """Forward passes inside keep less; their backward pass may run outside."""
    calls = _Calls()
    try:
        with calls, torch.autograd.graph.saved_tensors_hooks(calls.pack, lambda packed: packed()):
            yield
    finally:
        calls.latest.clear()  # a graph that is kept holds `calls`


def _is_cast(x: Tensor) -> bool:
    """Whether autocast would cast the input `x` of a product."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def unchanged(source: Tensor, made: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`made`, with a RuntimeError where `source` was changed in place since: with hooks autograd does not look."""
    version = source._version

    def checked() -> Tensor:
        if source._version != version:
            raise RuntimeError(
                f"a tensor of shape {list(source.shape)} that the gradient needs was changed in place"
            )
        return made()

    return checked


class _Calls(TorchFunctionMode):
    """Casts for linear maps itself, and knows how the tensors that they and activations made are made again.

    Attributes:
        latest: "weight", "input" -> the tensor that was cast last, its version, whether with gradients, and the cast.
        made: address of a storage -> the tensor on it, its version and a function that computes it again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, tuple[Tensor, int, bool, Tensor]] = {}
        self.made: dict[int, tuple[TensorWeakRef, int, Callable[[], Tensor]]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and not kwargs and _is_cast(args[0]):
            args = self._cast_once(*args)
        result = function(*args, **kwargs)
        if function in ACTIVATIONS and args and result is not args[0]:
            source = args[0].detach()
            self._note(result, source, lambda: function(source, *args[1:], **kwargs))
        return result

    def _cast_once(self, x: Tensor, weight: Tensor, *bias: Tensor | None) -> tuple[Tensor | None, ...]:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = self._cast("input", x, dtype)
        if not weight.requires_grad and weight.dtype != dtype:
            source, weight = weight, self._cast("weight", weight, dtype)
            self._note(weight, source, lambda: self._cast("weight", source, dtype, keep=False))
        return (x, weight, *bias)

    def _cast(self, role: str, tensor: Tensor, dtype: torch.dtype, keep: bool = True) -> Tensor:
        """`tensor` in `dtype`; the same one again if the last of its role was this."""
        state = (tensor._version, torch.is_grad_enabled() and tensor.requires_grad)
        last = self.latest.get(role)
        if last is not None and last[0] is tensor and last[1:3] == state:
            return last[3]
        cast = tensor.to(dtype)
        if keep and cast is not tensor:
            self.latest[role] = (tensor, *state, cast)
        return cast

    def _note(self, made: Tensor, source: Tensor, again: Callable[[], Tensor]) -> None:
        if torch.is_grad_enabled():
            address = made.untyped_storage().data_ptr()
            self.made[address] = (TensorWeakRef(made), made._version, unchanged(source, again))
            weakref.finalize(made, self.made.pop, address, None)  # then another tensor may have the address

    def pack(self, kept: Tensor) -> Callable[[], Tensor]:
        """What autograd keeps for `kept`: a function that returns it."""
        noted = self.made.get(kept.untyped_storage().data_ptr())
        made = None if noted is None else noted[0]()
        if noted is None or made is None or made._version != noted[1] or made.dtype != kept.dtype:
            return unchanged(kept, lambda: kept)
        again, size, stride, offset = noted[2], kept.size(), kept.stride(), kept.storage_offset()
        return lambda: again().as_strided(size, stride, offset)
