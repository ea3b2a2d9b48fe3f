"""Hybrids as the pass over the layers sees them: linear layers are chosen, started from the attention, and fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import __version__ as transformers_version

from mhconvert.errors import BudgetError, UnsupportedError

from ..layer_kinds import CODES, FULL, LINEAR, layer_kind
from ..layer_sensitivity import LayerSensitivity
from ..mla.bit_allocation import expected_divergence, least_bytes, most_bytes
from ..mla.code_basis import LayerBases
from ..mla.coded_class import coded_config
from ..mla.coded_method import BUDGET_BYTES, CodedMLA
from ..refusals import require
from .layer import mixer_layer
from .linear_choice import choose, with_linear
from .settings import HybridSettings
from .states import facts_by_length, state_bytes

LONGEST_CONTEXT = 32768  # tokens: the default is not more
LEAST_TRANSFORMERS = (5, 23)  # whose Mamba2 norms each group by itself, and whose caches give states by layer
FIT_STEPS = {"quick": 60, "default": 360, "high": 1000}
LAYER_TOKENS = 65536  # that a linear layer is fitted on


def unsupported() -> str | None:
    """Why the installed transformers cannot hold a hybrid; None: it can."""
    found = tuple(int(part) for part in transformers_version.split(".")[:2])
    least = ".".join(map(str, LEAST_TRANSFORMERS))
    return (
        None
        if found >= LEAST_TRANSFORMERS
        else f"it needs transformers {least}, and this is {transformers_version}"
    )


def hybrid_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    from ..mla import modeling_hybrid  # of modules that earlier versions of transformers do not have

    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_hybrid, f"Hybrid{donor.__name__}")


class HybridMLA(CodedMLA):
    """A state of fixed size in some layers, the code of one latent a token in the others."""

    closed_form = False
    layer_tokens = LAYER_TOKENS
    fit_steps = FIT_STEPS

    def __init__(self, config: Any, settings: HybridSettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "hybrid")
        if reason := unsupported():
            raise UnsupportedError(f"hybrid cannot convert here: {reason}")
        self.context = _context(config, settings)
        self.count, self.fixed = _linear_layers(config.num_hidden_layers, settings)
        super().__init__(config, settings, effort)
        self.settings: HybridSettings = settings
        self.cache_context, self.fitted_layers = self.context, self.count
        self.state_bytes = self._states(BUDGET_BYTES)
        self.linear: tuple[int, ...] = self.fixed or ()
        self.costs: list[dict[str, float]] = [{} for _ in range(config.num_hidden_layers)]
        if self.fixed is None:
            self.survey_shares = (1.0,)
        self.config = coded_config(config, hybrid_class(type(config)))
        self.config.linear_mixer = settings.mixer
        self._set_linear(self.linear)
        self.coded_layers = config.num_hidden_layers - self.count
        self._require_states()
        if settings.plan is not None:
            super()._take_plan(settings.plan)

    def _take_plan(self, plan: Any) -> None:
        """It is of linear layers too, and taken when the budget of the others is known."""

    def _require_budget(self, whole: int) -> None:
        """The budget is that of a length of text: see `_require_states`."""

    def _require_states(self) -> None:
        """Set the bytes of a token's codes. Raises BudgetError where states and the smallest codes are too many."""
        donor = self.elements * BUDGET_BYTES * self.donor_config.num_hidden_layers * self.context
        total, states = int(self.settings.kv_budget * donor), self.count * self.state_bytes
        smallest = least_bytes(self.coded_layers, min(self.widths))
        most = most_bytes(self.coded_layers, self.elements, max(self.widths))
        self.budget = min(most, (total - states) // self.context)
        if self.budget < smallest:
            least = states + smallest * self.context
            raise BudgetError(
                f"kv_budget={self.settings.kv_budget:g} gives {total:,} bytes at {self.context} tokens; {self.count} "
                f"states of {self.state_bytes:,} and the smallest codes need {least:,}; the least is "
                f"kv_budget={math.ceil(1e4 * least / donor) / 1e4:g}, or a longer --context"
            )

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes per token of the context, all layers, rounded up; states are float32, their convolutions are not."""
        states = self.count * self._states(element_bytes)
        return super().kv_bytes(element_bytes) + -(-states // self.context)

    def layer_bytes(self) -> list[int]:
        """Bytes of a token's row in each layer, none in linear ones; empty before the budget is divided."""
        return [0 if i in self.linear else size for i, size in enumerate(super().layer_bytes())]

    def share_out(self, sensitivities: Sequence[LayerSensitivity]) -> None:
        """Choose the linear layers, unless they are given, and the bits of the others' components."""
        self.bases = LayerBases(sensitivities)
        spectra, last = [basis.divergence for basis in self.bases], len(sensitivities) - 1
        if self.fixed is not None:
            if self.settings.plan is None:
                none = [0.0] * (last + 1)
                self.bits = with_linear(spectra, none, self.fixed, self.budget, self.widths).bits
        else:
            measured = [float(one.replaced_cost) for one in sensitivities]
            costs = [cost if 0 < i < last else None for i, cost in enumerate(measured)]
            found = choose(spectra, costs, self.count, self.budget, self.widths)
            self._set_linear(found.linear)
            self.bits = found.bits
            self.costs = [{LINEAR: cost} for cost in measured]
            self.notice = f"linear layers: {', '.join(map(str, found.linear))}"
        for index, (costs_of, spectrum, bits) in enumerate(zip(self.costs, spectra, self.bits, strict=True)):
            if index not in self.linear:
                costs_of[CODES] = expected_divergence([spectrum], [bits])

    def layer_sizes(self, index: int) -> dict[str, Any]:
        """The bytes of a state, or what coded latents say of a layer; nothing before the choice."""
        if not self.bits:
            return {}
        linear, donor = index in self.linear, self.elements * BUDGET_BYTES
        sizes = {"state_bytes": self.state_bytes} if linear else super().layer_sizes(index)
        size = self.state_bytes / self.context if linear else sizes["kv_code_bytes"]
        return sizes | layer_kind(LINEAR if linear else FULL, size / donor, self.costs[index])

    @property
    def kind_facts(self) -> dict[str, Any]:
        """What a linear layer is."""
        return {"mixer": self.settings.mixer}

    def totals(self) -> dict[str, Any]:
        """{"states": what `facts_by_length` says of them}; which layers have one is None before the choice."""
        donor = self.elements * BUDGET_BYTES * self.donor_config.num_hidden_layers
        codes, states = sum(self.layer_bytes() or [self.budget]), self.count * self.state_bytes
        return {
            "states": facts_by_length(self.context, codes, states, donor)
            | {"mixer": self.settings.mixer, "count": self.count, "linear_layers": list(self.linear) or None}
        }

    def new_parameters(self) -> int:
        """Parameters of the mean layer: coded ones at the full width of their latents."""
        with torch.device("meta"):
            mixer = mixer_layer(self.config)
        linear = sum(parameter.numel() for parameter in mixer.parameters())
        return (self.count * linear + self.coded_layers * super().new_parameters()) // (
            self.count + self.coded_layers
        )

    def convert(
        self,
        statistics: Any,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The attention of layer `index`, float32: a linear one, whose fit follows, or that of codes; all are linear in
        a survey."""
        if index in self.linear or self.effort == "survey":
            device = position_embeddings[0].device
            linear = mixer_layer(self.config, statistics, inputs, targets, device)
            linear.layer_idx = linear.mixer.layer_idx = index
            linear.cache_bytes = self.state_bytes / self.context
            return linear, self.layer_sizes(index)
        module: Any
        module, chosen = super().convert(statistics, index, inputs, targets, position_embeddings)
        module.cache_bytes, module.closed_form = self.layer_bytes()[index], True
        return module, chosen

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        if chosen["kind"] != LINEAR:
            super().restore(index, chosen)

    def example_config(self) -> Any:
        """As of coded latents, with linear layers in the middle where a survey will choose them."""
        if not self.linear:
            self._set_linear(range(1, self.count + 1))
        return super().example_config()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result."""
        return hybrid_class(type(self.donor_config))

    def _states(self, element_bytes: int) -> int:
        return state_bytes(self.facts.heads, self.facts.head_dim, element_bytes)

    def _set_linear(self, layers: Sequence[int]) -> None:
        self.linear = tuple(layers)
        self.config.linear_layers = list(layers)


def _context(config: Any, settings: HybridSettings) -> int:
    """The tokens at which the budget is counted. Raises BudgetError for more than the donor reads."""
    reads = getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
    context = settings.context or min(reads, LONGEST_CONTEXT)
    if context > reads:
        raise BudgetError(f"context={context} is more than the {reads} tokens that the donor reads")
    return context


def _linear_layers(layers: int, settings: HybridSettings) -> tuple[int, tuple[int, ...] | None]:
    """How many layers are linear, and which where the user says so. Raises BudgetError for what cannot be."""
    given = settings.linear_layers
    if settings.plan is not None:
        given = [index for index, layer in enumerate(settings.plan) if layer.get("kind") == LINEAR]
        if len(settings.plan) != layers:
            raise BudgetError(f"the plan has {len(settings.plan)} layers and the donor {layers}")
    if given is not None:
        for index in given:
            if not 0 <= index < layers:
                raise BudgetError(f"linear_layers has {index}, and the donor's layers are 0 to {layers - 1}")
        if not 0 < len(given) < layers:
            raise BudgetError(
                f"{len(given)} of {layers} layers are linear: some are to be, and one keeps the text"
            )
        return len(given), tuple(given)
    if layers < 3:
        named = "name one with --linear-layers, or " * (layers == 2)
        raise BudgetError(
            f"num_hidden_layers={layers}: the first and the last layer are kept, and there is no other to be linear; "
            f"{named}convert the donor with --to mla"
        )
    count = round(settings.linear * layers)
    if not 0 < count <= layers - 2:
        raise BudgetError(
            f"linear={settings.linear:g} of {layers} layers is {count}; from 1 to {layers - 2} can be linear, as the "
            "first and the last are kept"
        )
    return count, None


METHOD = HybridMLA
