"""The tuner: puts Hydra adapters on the target modules of a model."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from mhconvert.convert.errors import AdapterError
from mhconvert.convert.hydra import offload, targets
from mhconvert.convert.hydra.layer import HydraLayer, HydraLinear


class HydraModel(BaseTuner):
    """A model with Hydra adapters; `peft.get_peft_model(model, HydraConfig(…))` makes one."""

    prefix = "hydra_"
    tuner_layer_cls = HydraLayer
    target_module_mapping = targets.DEFAULT_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter to `model`.

        Raises AdapterError, before anything is changed, for a name that peft confuses with a parameter's, for targets
        that match nothing, and for what this peft cannot do.
        """
        if adapter_name in self.prefix or "." in adapter_name:
            raise AdapterError(
                f"adapter name '{adapter_name}' cannot be told from the parameter names '{self.prefix}…' in saved "
                "keys; choose another one"
            )
        config: Any = self.peft_config[adapter_name]
        bias = config.bias
        if bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise AdapterError(
                f"bias='{bias}': peft {peft.__version__} would train biases and not save them; that needs peft 0.21"
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The last that peft does when it loads an adapter, after it has spread the model over devices and disk."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.modules():
            if isinstance(layer, HydraLayer):
                for name in layer.adapter_layer_names:
                    offload.mend_index(getattr(layer, name))

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        targets.require_match(peft_config.target_modules, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = peft_config.ranks(current_key)
        if isinstance(target, HydraLayer):
            target.update_layer(adapter_name, ranks, peft_config)
            return
        quantization = get_quantization_kwargs(self.model)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        self._require_supported(base, current_key, quantization)
        layer = HydraLinear(target, adapter_name, ranks, peft_config, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _require_supported(self, base: nn.Module, name: str, quantization: dict[str, Any]) -> None:
        """Raises AdapterError for a module that an adapter cannot be put on, or cannot be merged into."""
        targets.require_linear(base, name, resolve_quantization_backend(base, **quantization) is not None)
        if targets.is_tied_head(base, self.model):
            raise AdapterError(
                f"target module '{name}' is tied to the input embedding, which merging would change as well; leave it "
                "out, or load the model with tie_word_embeddings=False"
            )
        if getattr(base, "_hf_tp_plan", None) is not None:
            raise AdapterError(
                f"target module '{name}' is split over processes (tensor parallel): a sequential branch needs whole "
                "outputs; load the model without tp_plan"
            )
