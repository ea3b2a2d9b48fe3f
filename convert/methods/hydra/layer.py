"""A linear layer with Hydra adapters on it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from mhconvert.errors import AdapterError

from . import offload
from .branches import Branches, Pair, merged_bias, merged_weight, weight_delta
from .config import HydraConfig


class HydraLayer(BaseTunerLayer):
    """The adapters of one base layer, and merging them into it. Shapes as in `branches`.

    A branch of rank 0 has no entry. The base layer's own weights are kept while adapters are merged, so that unmerging
    restores the same bits, at the price of a second copy.

    Attributes:
        hydra_par_A, hydra_par_B: by adapter, (r, in) and (out, r) of the branch that reads the layer's input.
        hydra_seq_A, hydra_seq_B: by adapter, (r, out) and (out, r) of the branch that reads the layer's output.
    """

    adapter_layer_names = ("hydra_par_A", "hydra_par_B", "hydra_seq_A", "hydra_seq_B")
    other_param_names = ("hydra_scale", "hydra_dropout")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        plain: Any = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(plain, **quantization)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.hydra_par_A, self.hydra_par_B = nn.ParameterDict(), nn.ParameterDict()
        self.hydra_seq_A, self.hydra_seq_B = nn.ParameterDict(), nn.ParameterDict()
        self.hydra_scale: dict[str, float] = {}
        self.hydra_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._unmerged: tuple[Tensor, Tensor | None] | None = None

    def update_layer(self, adapter_name: str, ranks: tuple[int, int], config: HydraConfig) -> None:
        """Add an adapter of `ranks` (r_par, r_seq); it replaces one of the same name."""
        r_par, r_seq = ranks
        for name in self.adapter_layer_names:
            matrices = getattr(self, name)
            offload.keep_in_memory(matrices)
            if adapter_name in matrices:
                del matrices[adapter_name]
        if r_par:
            self.hydra_par_A[adapter_name] = nn.Parameter(torch.empty(r_par, self.in_features))
            self.hydra_par_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r_par))
        if r_seq:
            self.hydra_seq_A[adapter_name] = nn.Parameter(torch.empty(r_seq, self.out_features))
            self.hydra_seq_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r_seq))
        self.hydra_scale[adapter_name] = config.scale
        self.hydra_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(
        self, adapter_name: str, zero_up: bool = True, generator: torch.Generator | None = None
    ) -> None:
        """Initialise A uniformly as `nn.Linear` does, and B with zeros (`zero_up`) or like A."""
        for down, up in ((self.hydra_par_A, self.hydra_par_B), (self.hydra_seq_A, self.hydra_seq_B)):
            if adapter_name in down:
                nn.init.kaiming_uniform_(down[adapter_name], a=math.sqrt(5), generator=generator)
                if zero_up:
                    nn.init.zeros_(up[adapter_name])
                else:
                    nn.init.kaiming_uniform_(up[adapter_name], a=math.sqrt(5), generator=generator)

    def branches(self, adapter_name: str) -> Branches:
        """The adapter's scale and matrices, without gradients."""
        par = self._pair(self.hydra_par_A, self.hydra_par_B, adapter_name)
        seq = self._pair(self.hydra_seq_A, self.hydra_seq_B, adapter_name)
        return Branches(self.hydra_scale[adapter_name], par, seq)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' − W (out, in) of one adapter on the layer's own weight W, whatever is merged; AdapterError: quantised."""
        return weight_delta(self._own_weights()[0], self.branches(adapter_name))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer, beside those that are merged already.

        Args:
            safe_merge: whether a result that is not finite is refused before anything is changed.
            adapter_names: None: the active ones.
        Raises:
            AdapterError: for a quantised base layer, or a result that is refused.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hydra_scale]
        if not names:
            return
        own = self._own_weights()
        weight, bias = self._merged_weights(names)
        if safe_merge:
            _require_finite(names, weight, bias)
        self._write(weight, bias)
        if (
            offload.hook_of(self.get_base_layer()) is not None
        ):  # the copy must not fill the device that computes
            own = own[0].cpu(), None if own[1] is None else own[1].cpu()
        self._unmerged = own
        self.merged_adapters.extend(names)

    def require_mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises AdapterError where `merge` would, and changes nothing."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.hydra_scale and name not in self.merged_adapters]
        if not names:
            return
        self._own_weights()
        if safe_merge:
            with onload_layer(self):
                merged = self._merged_weights(names)
            _require_finite(names, *merged)

    def unmerge(self) -> None:
        """Restore the base layer's own weights, bit for bit."""
        if self._unmerged is None:
            warnings.warn("no adapter is merged, so there is nothing to unmerge", stacklevel=2)
            return
        self._write(*self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move an adapter to its base layer's device; of an offloaded one (on the meta device), where it computes."""
        hook = offload.hook_of(self.get_base_layer())
        device = hook.execution_device if device is None and hook is not None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _merged_weights(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """The weight W' and bias b' with the adapters `names` and those that are merged already."""
        weight, bias = self._own_weights()
        adapters = [self.branches(name) for name in (*self.merged_adapters, *names)]
        return merged_weight(weight, adapters), None if bias is None else merged_bias(bias, adapters)

    def own_values(self) -> dict[str, Tensor]:
        """The base layer's "weight" and "bias" without adapters, as they are kept while adapters are merged."""
        return {
            kind: own
            for kind, own in zip(("weight", "bias"), self._unmerged or (), strict=False)
            if own is not None
        }

    def _own_weights(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's W and b without adapters (not copies). Raises AdapterError where they are quantised."""
        if self._unmerged is not None:
            return self._unmerged
        base: Any = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        floats = weight is not None and weight.is_floating_point() and weight.element_size() > 1  # no float8
        if self.quantization_backend is not None or not floats:
            name = getattr(self.quantization_backend, "backend_name", "") or type(base).__name__
            raise AdapterError(
                f"the base layer is quantised ({name}): its weight cannot take an adapter in exactly; load the base "
                "model unquantised, merge there, and quantise the result"
            )
        return weight.data, None if base.bias is None else base.bias.data

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make these the base layer's values, on its device and in its dtype."""
        base: Any = self.get_base_layer()
        base.weight.data = weight.to(base.weight.device, base.weight.dtype)
        if bias is not None:
            base.bias.data = bias.to(base.bias.device, base.bias.dtype)

    @staticmethod
    def _pair(down: nn.ParameterDict, up: nn.ParameterDict, name: str) -> Pair | None:
        return (down[name].detach(), up[name].detach()) if name in down else None


class HydraLinear(nn.Module, HydraLayer):
    """A linear layer, quantised or not, with Hydra adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        ranks: tuple[int, int],
        config: HydraConfig,
        **quantization: Any,
    ) -> None:
        nn.Module.__init__(self)
        HydraLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, ranks, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, in_features) -> (…, out_features), in the dtype of the base layer's output.

        Every sequential branch reads the base layer's output, never the sum so far.
        """
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return base
        for name in self.adapter_layer_names:
            offload.keep_in_memory(getattr(self, name))
        result = base
        for name in self.active_adapters:
            if name in self.hydra_scale:
                result = self._add(name, result, x, base)
        return result.to(base.dtype)

    def _add(self, name: str, result: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """`result` plus the adapter's branches for the input `x` and the base layer's output `base`."""
        scale, dropout = self.hydra_scale[name], self.hydra_dropout[name]
        for down, up, source in (
            (self.hydra_par_A, self.hydra_par_B, x),
            (self.hydra_seq_A, self.hydra_seq_B, base),
        ):
            if name in down:
                inner = F.linear(self._cast_input_dtype(source, down[name].dtype), down[name])
                part = F.linear(dropout(inner), up[name])
                result = result + (part if scale == 1 else part * scale)
        return result

    def __repr__(self) -> str:
        return "hydra." + super().__repr__()


def _require_finite(names: list[str], weight: Tensor, bias: Tensor | None) -> None:
    """Raises AdapterError naming the adapters whose merged weight or bias is not finite."""
    if not all(torch.isfinite(part).all() for part in (weight, bias) if part is not None):
        raise AdapterError(
            f"merging {', '.join(names)} gives weights that are not finite: the adapter holds NaN or infinity, or "
            f"the result leaves {str(weight.dtype).removeprefix('torch.')}; nothing was merged"
        )
