"""Windowed layers as the pass over the layers sees them: plan, then one layer at a time, then the configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts
from ..budget_division import LayerNeed
from ..layer_kinds import FULL, WINDOWED, layer_kind
from ..refusals import require
from ..registry import Method, whole_elements
from .converted_class import converted_class, first_tokens_config
from .layer import fitted_sinks, windowed_attention, with_sinks
from .modeling_swa import in_window
from .settings import SWASettings
from .targets import NO_SINK, target_for, windowed_config
from .window_plan import Windows, window_plan

LAYER_TOKENS = 32768  # that a layer is fitted on: a few hundred steps read no more
SINK_TOKENS = 8192  # that the closed form of its sinks reads: a number for each head


class SWA(Method):
    """Attention on the whole text → on a window of it, in the layers that need the rest least."""

    replaced = ("self_attn.",)
    layer_tokens = LAYER_TOKENS

    def __init__(self, config: Any, settings: SWASettings, effort: str):
        require(config, "swa")
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.facts = attention_facts(config)
        self.target = target_for(config, settings.sinks)
        self.plan = window_plan(config, settings, self.target.keeps_first)
        windowless = self.plan.full == len(self.plan.free)
        self.target = target_for(config, settings.sinks, windowless)
        self.closed_form = self.target.keeps_first  # of which the donor's own weights are a part
        self.learns_sinks = self.target.sinks and settings.sinks != "none"
        self.windows: Windows = self.plan.windows(self.plan.spread())
        self.least_row = 0 if windowless else self.plan.window + 1
        self.cache_context = self.plan.context
        self.shared_out = False
        self.costs: dict[int, float] = {}

    def kv_elements(self) -> int:
        """Cache elements per token of the context, all layers, rounded up."""
        share = sum(self.plan.held(self.windows)) / self.plan.context
        return int(whole_elements(self.facts.kv_elements * share, self.plan.context))

    @property
    def divisible(self) -> bool:
        """Whether there is a choice of layers."""
        return self.effort != "survey" and self.plan.divisible

    @property
    def survey_shares(self) -> tuple[float, ...]:
        """The one at which every layer is windowed: a layer is one or the other."""
        return (self.plan.least_share,)

    def share_out(self, needs: Sequence[LayerNeed]) -> None:
        """Keep those layers full whose windowing was measured to cost most."""
        self.costs = {index: needs[index].divergence for index in self.plan.free}
        full = sorted(sorted(self.costs, key=lambda index: -self.costs[index])[: self.plan.full])
        self.windows, self.shared_out = self.plan.windows(full), True
        self.notice = f"full layers: {', '.join(map(str, full))}"

    def layer_sizes(self, index: int) -> dict[str, Any]:
        """The kind of layer, and the tokens that it caches at the context; nothing where a survey will choose."""
        if self.divisible and not self.shared_out:
            return {}
        held, donor = (self.plan.held(windows)[index] for windows in (self.windows, self.plan.own))
        window, cost = self.windows[index], self.costs.get(index)
        costs = {} if cost is None else {WINDOWED: cost}
        return layer_kind(WINDOWED if window else FULL, held / donor, costs) | {
            "window": window,
            "cached_tokens": held,
        }

    @property
    def kind_facts(self) -> dict[str, Any]:
        """How wide a windowed layer's window is, and what stands for the tokens that it drops."""
        return {"window": self.plan.window, "sinks": self.totals()["windows"]["sinks"]}

    def totals(self) -> dict[str, Any]:
        """{"windows": what `WindowPlan.facts` says of them}."""
        facts = self.plan.facts(self.windows, lambda length: self.plan.share(self.windows, length))
        sinks = "first" if self.target.keeps_first else "learnt" if self.learns_sinks else "none"
        return {"windows": facts | {"class": self.target.model_type, "sinks": sinks}}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention, its sinks included."""
        config = copy.deepcopy(self.finish())
        config.num_hidden_layers = 1
        for field in ("layer_types", "kv_windows"):
            if of_layers := getattr(config, field, None):
                setattr(config, field, of_layers[:1])
        with torch.device("meta"):
            attention = self.model_class(config).get_decoder().layers[0].self_attn
        return sum(parameter.numel() for parameter in attention.parameters())

    def stored(self, attention: Any) -> dict[str, Tensor]:
        """The tensors of a layer; the class has biases in all four maps or in none."""
        state = dict(attention.state_dict())
        if self.target.sinks and self.facts.input_bias and not self.facts.output_bias:
            state["o_proj.bias"] = state["o_proj.weight"].new_zeros(self.donor_config.hidden_size)
        return state

    def observe(self, attention: Any, inputs: Tensor, rotary: Any) -> Any:
        """The donor's attention itself: the text is read when the sinks are fitted."""
        return attention

    def convert(
        self,
        statistics: Any,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[Any, dict[str, Any]]:
        """The attention of layer `index`, float32 on the embeddings' device, and its window."""
        window = self.windows[index]
        if self.target.keeps_first:
            module = copy.deepcopy(statistics)
            if made := self._new_windows()[index]:
                in_window(module, made)
        else:
            module = windowed_attention(statistics, window)
        if self.target.sinks:
            sinks = torch.full((self.facts.heads,), NO_SINK)
            if self.learns_sinks and window and not self.plan.own[index]:
                rows = max(1, SINK_TOKENS // inputs.shape[1])
                sinks = fitted_sinks(module, inputs[:rows], targets[:rows], position_embeddings)
            with_sinks(module, sinks)
        module.cache_elements = (
            self.facts.kv_elements * self.plan.held(self.windows)[index] / self.plan.context
        )
        return module.eval().requires_grad_(False), {"window": window} | self.layer_sizes(index)

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        self.windows[index] = chosen["window"]

    def finish(self) -> Any:
        """The configuration of the converted model."""
        if self.target.keeps_first:
            return first_tokens_config(self.donor_config, self._new_windows())
        return windowed_config(self.donor_config, self.target, self.windows)

    def example_config(self) -> Any:
        """The same: which layers are windowed changes no size."""
        return self.finish()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result, or ours."""
        if self.target.keeps_first:
            return converted_class(type(self.donor_config))
        return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[self.target.model_type]]

    def _new_windows(self) -> Windows:
        """Of the layers that have none in the donor; None for the others."""
        return [None if own else window for own, window in zip(self.plan.own, self.windows, strict=True)]


METHOD = SWA
