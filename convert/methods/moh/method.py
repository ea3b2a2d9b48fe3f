"""MoH as the pass over the layers sees it: plan, then one layer at a time, then the configuration of the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...attention.rotary import LayerRotary
from ...families.facts import attention_facts, layer_window
from ..budget_division import LayerNeed, divide
from ..cache_elements import cache_elements
from ..protected_heads import groups_of, protected_heads
from ..refusals import require
from ..registry import Method
from ..routed.attention_kinds import is_converted, key_flops, require_routable
from .budget import Heads, heads_of
from .converted_class import converted_class, mixture_config
from .head_router import HeadRouter
from .observed import Observed, observe
from .settings import MoHSettings
from .surgery import linear_scores, norm_scores, shared_units

FLOPS_CONTEXT = 2048  # tokens in the cache, for the FLOPs that a plan states


class MoH(Method):
    """Multi-head or grouped-query attention → the same heads, of which a router gives each token some."""

    replaced = ("self_attn.",)

    def __init__(self, config: Any, settings: MoHSettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "moh")
        require_routable(config, settings.route)
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.facts, layers = attention_facts(config), config.num_hidden_layers
        units = self.facts.heads if settings.route == "heads" else self.facts.kv_heads
        named = protected_heads(settings.protect, layers, self.facts.heads)
        self.kept = groups_of(named, self.facts.heads, units)
        self.budget: Heads = heads_of(
            settings, units, layers, effort == "survey", [len(kept) for kept in self.kept]
        )
        self.active = list(self.budget.active)
        self.shared_out = False
        self.config = mixture_config(config, settings.route, settings.router)
        if self._calibrated_norms:
            self.config.norm_scale, self.config.norm_offset = ([[] for _ in range(layers)] for _ in "ab")

    def kv_elements(self) -> int:
        """Cache elements per token, all layers: as many as the donor's, since any head may read any token."""
        return int(sum(cache_elements(self.donor_config)))

    @property
    def divisible(self) -> bool:
        """Whether layers may have numbers of active heads of their own."""
        return self.effort != "survey" and self.budget.free

    @property
    def survey_shares(self) -> tuple[float, ...]:
        """Shares of a layer's heads, active, at which a survey measures it."""
        return self.budget.survey_shares()

    def share_out(self, needs: Sequence[LayerNeed]) -> None:
        """Divide the active heads over the layers by their measured needs, one for each."""
        budget, total = self.budget, sum(self.budget.active)
        self.active = divide(needs, total, budget.least, budget.units, 1, budget.units)
        self.shared_out = True

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned heads of one layer; the active ones are missing where a survey will choose them."""
        sizes = {"shared_heads": self.budget.shared[index]}
        known = self.shared_out or not self.divisible
        return {"active_heads": self.active[index]} | sizes if known else sizes

    def totals(self) -> dict[str, Any]:
        """Sums over the layers, of the donor and converted.

        Returns:
            active_heads; kv_heads_read by a decoding step, where groups are routed; attention_flops of one token after
            FLOPS_CONTEXT others, as far as a layer's window reaches.
        """
        facts, config, layers = self.facts, self.donor_config, range(len(self.active))
        size = facts.heads // self.budget.units
        heads = {"donor": len(layers) * facts.heads, "converted": size * sum(self.active)}
        products = [
            key_flops(config, i, facts.head_dim)
            * min(FLOPS_CONTEXT, layer_window(config, i) or FLOPS_CONTEXT)
            for i in layers
        ]
        maps, routers = 2 * sum(self._matrices), 2 * sum(map(self._of_router, layers))
        donor = maps + sum(facts.heads * product for product in products)
        routed = maps + sum(size * n * product for n, product in zip(self.active, products, strict=True))
        sums: dict[str, Any] = {"active_heads": heads}
        if self.settings.route == "groups":
            whole = len(layers) * facts.kv_heads
            sums["kv_heads_read"] = {"donor": whole, "converted": sum(self.active)}
        flops = {"context": FLOPS_CONTEXT, "donor": donor, "converted": routed + routers}
        return sums | {"attention_flops": flops}

    def new_parameters(self) -> int:
        """Parameters of the mean layer's attention, its router included."""
        layers, own = (
            len(self.active),
            sum(sum(p.numel() for p in each.parameters()) for each in self._donors),
        )
        routers = sum(map(self._of_router, range(layers)))
        return math.ceil(own / len(self._donors) + routers / layers)

    @property
    def _matrices(self) -> list[int]:
        """(layers,), the numbers in the matrices of each layer's attention."""
        found = [sum(p.numel() for p in each.parameters() if p.dim() > 1) for each in self._donors]
        return found * (len(self.active) // len(found))

    def _of_router(self, index: int) -> int:
        """The parameters of a layer's router."""
        config = self.example_config()
        chosen = self.active[index] - self.budget.shared[index]
        if not 0 < chosen < self.budget.units - self.budget.shared[index]:
            return 0
        with torch.device("meta"):
            return sum(p.numel() for p in HeadRouter(config, index).parameters())

    def observe(self, attention: Any, inputs: Tensor, rotary: LayerRotary) -> Observed:
        """The donor's attention, and what its heads add to the calibration text `inputs` (N, L, D)."""
        config = mixture_config(self.donor_config, self.settings.route)
        return observe(attention, config, inputs, rotary.embeddings, self._routed)

    def convert(
        self,
        statistics: Observed,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The routed attention of layer `index`, float32 on the embeddings' device, and the heads chosen for it."""
        count, seen = self.budget.shared[index], statistics.statistics
        first = self.settings.shared_heads == "first"
        shared = list(range(count)) if first else shared_units(seen, count, self.kept[index])
        chosen: dict[str, Any] = {"active_heads": self.active[index], "shared_heads": shared}
        routed = [unit for unit in range(self.budget.units) if unit not in shared]
        if self._calibrated_norms:
            scale, offset = norm_scores(seen, routed)
            chosen |= {"norm_scale": scale, "norm_offset": offset}
        self.restore(index, chosen)
        module = self._routed(copy.deepcopy(statistics.attention), copy.deepcopy(self.config), index)
        if hasattr(module, "router") and module.router.learned:
            weight, bias = linear_scores(seen, routed)
            _learn(module.router, weight, bias)
        module = module.to(position_embeddings[0].device, torch.float32)
        name = "protected_heads" if self.settings.route == "heads" else "protected_kv_heads"
        own = {name: self.kept[index]} if self.kept[index] else {}
        return module.eval().requires_grad_(False), chosen | own

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        _set(self.config, index, chosen)

    def finish(self) -> Any:
        """The configuration of the converted model with the heads of every layer."""
        return copy.deepcopy(self.config)

    def example_config(self) -> Any:
        """A configuration of the planned size in which each layer's first heads are the shared ones."""
        config = self.finish()
        for index, (active, shared) in enumerate(zip(self.active, self.budget.shared, strict=True)):
            chosen: dict[str, Any] = {"active_heads": active, "shared_heads": list(range(shared))}
            if self._calibrated_norms:
                routed = self.budget.units - shared
                chosen |= {"norm_scale": [1.0] * routed, "norm_offset": [0.0] * routed}
            _set(config, index, chosen)
        return config

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result."""
        return converted_class(type(self.donor_config))

    @property
    def _calibrated_norms(self) -> bool:
        return self.settings.router == "norm" and self.settings.shared_heads == "calibrated"

    @property
    def _routed(self) -> Any:
        """The class of a converted attention."""
        return self.model_class.decoder_class.attention_class

    @cached_property
    def _donors(self) -> list[nn.Module]:
        """The attention of each donor layer on the meta device; of the first alone where all have its shapes."""
        donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.donor_config)]
        config = copy.deepcopy(self.donor_config)
        if not is_converted(config):
            config.num_hidden_layers = 1
        with torch.device("meta"):
            return [layer.self_attn for layer in donor(config).get_decoder().layers]


def _set(config: Any, index: int, chosen: dict[str, Any]) -> None:
    """Write what was chosen for layer `index` into the configuration's lists."""
    for name in ("active_heads", "shared_heads", "norm_scale", "norm_offset"):
        if name in chosen:
            getattr(config, name)[index] = copy.copy(chosen[name])


@torch.no_grad()
def _learn(router: Any, weight: Tensor, bias: Tensor) -> None:
    """Write the closed form's scores into `router`; every gate is 1."""
    for parameter in router.parameters():
        parameter.zero_()
    router.score.weight.copy_(weight)
    router.score.bias.copy_(bias)


METHOD = MoH
