"""The peft tuner that puts Hydra adapters on the target modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from mhconvert.errors import AdapterError

from . import offload, targets
from .layer import HydraLayer, HydraLinear


class HydraModel(BaseTuner):
    """A model with Hydra adapters; `peft.get_peft_model(model, HydraConfig(…))` makes one.

    Not supported, unlike LoRA: `adapter_names` for the rows of a batch, `add_weighted_adapter`, hotswapping.
    """

    prefix = "hydra_"
    tuner_layer_cls = HydraLayer
    target_module_mapping = targets.DEFAULT_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter to `model`.

        Raises:
            AdapterError: before anything is changed, for a name that peft confuses with a parameter's, for targets
                that match nothing, and for what this peft cannot do.
        """
        if adapter_name in self.prefix or "." in adapter_name:
            reason = (
                "has a dot in it"
                if "." in adapter_name
                else f"is a part of '{self.prefix}', with which its parameters' names begin"
            )
            raise AdapterError(
                f"adapter name '{adapter_name}' {reason}: peft could not find it in saved keys; choose another one"
            )
        config: Any = self.peft_config[adapter_name]
        bias = config.bias
        if bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise AdapterError(
                f"bias='{bias}': peft {peft.__version__} would train biases and not save them; that needs peft 0.21"
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (None: the active ones) into every base layer. Raises AdapterError before any is changed."""
        self._require_mergeable(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters merged into its weights. Raises AdapterError before any is changed."""
        self._require_mergeable(safe_merge, adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _require_mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises AdapterError naming the first module that cannot be merged."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, HydraLayer):
                try:
                    layer.require_mergeable(safe_merge, adapter_names)
                except AdapterError as error:
                    raise AdapterError(f"{name}: {error}") from error

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuses `adapter_names`, which peft passes here and would then ignore."""
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "adapter_names: Hydra has no other adapter for each row of a batch; choose one for all with set_adapter"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """What is saved of the base layers, biases and heads, are their own values: a loaded adapter is not merged."""
        for name, layer in model.named_modules():
            if isinstance(layer, HydraLayer):
                own = {f"{name}.base_layer.{kind}": value for kind, value in layer.own_values().items()}
                # peft removes heads from this very dict after this call
                state_dict.update((key, value) for key, value in own.items() if key in state_dict)
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        return tensors

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Called last when peft loads an adapter, after the model was spread over devices and disk."""
        for layer in self.modules():
            if isinstance(layer, HydraLayer):
                for name in layer.adapter_layer_names:
                    offload.keep_in_memory(getattr(layer, name))
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Called before peft replaces modules one by one: every refusal happens here."""
        targets.require_match(peft_config.target_modules, model)
        _maybe_include_all_linear_layers(peft_config, model)
        held = targets.holders(model)
        for name, module in targets.outside_tuners(model):
            if name and self._check_target_module_exists(peft_config, name):
                self._require_supported(module, name)
                if not isinstance(module, HydraLayer):
                    targets.require_unshared(module, name, held)

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
        """Put an adapter on `target`, which `parent` holds; peft calls this for every module that matches."""
        ranks = peft_config.ranks(current_key)
        if isinstance(target, HydraLayer):
            target.update_layer(adapter_name, ranks, peft_config)
            return
        self._require_supported(target, current_key)  # a given state dict may name modules beside the config
        quantization = get_quantization_kwargs(self.model)
        setattr(parent, target_name, HydraLinear(target, adapter_name, ranks, peft_config, **quantization))

    def _require_supported(self, module: nn.Module, name: str) -> None:
        """Raises AdapterError for a module that an adapter cannot be put on, or cannot be merged into."""
        if isinstance(module, HydraLayer):
            return
        quantised = resolve_quantization_backend(module, **get_quantization_kwargs(self.model)) is not None
        targets.require_linear(module, name, quantised)
        if targets.is_tied_head(module, self.model):
            raise AdapterError(
                f"target module '{name}' is tied to the input embedding, which merging would change as well; leave it "
                "out, or load the model with tie_word_embeddings=False"
            )
        if getattr(module, "_hf_tp_plan", None) is not None:
            raise AdapterError(
                f"target module '{name}' is split over processes (tensor parallel): a sequential branch needs whole "
                "outputs; load the model without tp_plan"
            )
