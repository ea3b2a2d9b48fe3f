"""DHA as the pass over the layers sees it: plan, then one layer at a time, then the configuration of the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mhconvert.errors import UnsupportedError

from ...attention.linalg import relative_error
from ...attention.projections import attention_weights, output_bias
from ...attention.rotary import LayerRotary
from ...attention.statistics import observe
from ...families.facts import attention_facts, family_of
from ..budget_division import LayerNeed
from ..layer_fits import BOTTLENECKS, FUSED_STEPS
from ..refusals import require
from ..registry import Method
from .assembly import assemble
from .budget import HeadBudget, head_budget
from .converted_class import converted_class, decoupled_config
from .division import Price, price, shared
from .grouping import EXACT_HEADS, Cluster, clusters
from .heads import Heads
from .observed import Observed, norms
from .settings import DHASettings
from .surgery import FusedWeights, aligned, cluster_map, fuse, parts

# Tokens on which candidates for a layer are compared, and how many candidates are, by effort.
PROBE_TOKENS = {"survey": 512, "quick": 1024, "default": 2048, "high": 4096}
CANDIDATES = {"survey": 2, "quick": 3, "default": 4, "high": 8}


class DHA(Method):
    """Grouped-query or multi-head attention → decoupled heads; the mathematics is in `surgery`."""

    replaced = ("self_attn.",)
    fit_steps, fit_options = FUSED_STEPS, BOTTLENECKS

    def __init__(self, config: Any, settings: DHASettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "dha")
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.facts = attention_facts(config)
        asked = "uniform" if settings.uniform else "equal_heads" if settings.equal_heads else None
        if asked and self.facts.qk_norm:
            raise UnsupportedError(
                f"a plan with {asked} fuses K heads too, and this donor's keys are divided by their RMS, which a fused "
                f"head does not have; leave out {asked}, and V heads alone are fused"
            )
        asked_for = replace(settings, protect=None) if effort == "survey" else settings  # layers of one size
        self.budget: HeadBudget = head_budget(config, asked_for, self.facts)
        self.heads, self.shared_out = self.budget.spread(), False
        self.price: Price | None = None
        free = settings.equal_heads and settings.plan is None
        self.unconstrained = replace(settings, equal_heads=False) if free else None
        self.stock = self.budget.stock and settings.fusion == "closed"
        self.config = decoupled_config(config, output_bias=not self.stock)
        if settings.fusion == "trained":
            self.config.k_fusion, self.config.v_fusion = ([[] for _ in self.heads] for _ in "kv")

    def kv_elements(self) -> int:
        """Cache elements per token, all layers."""
        return sum(self.heads) * self.facts.head_dim

    @property
    def divisible(self) -> bool:
        """Whether layers may have numbers of heads of their own."""
        return self.effort != "survey" and self.budget.free

    @property
    def survey_shares(self) -> tuple[float, ...]:
        """Shares of a donor layer's heads at which a survey measures it."""
        return self.budget.survey_shares()

    def share_out(self, needs: Sequence[LayerNeed]) -> None:
        """Divide the heads over the layers by their measured needs, one for each."""
        self.heads, self.shared_out = shared(needs, self.budget), True
        if self.unconstrained is not None:
            free = head_budget(self.donor_config, self.unconstrained, self.facts)
            self.price = price(needs, self.heads, free)
            self.notice = self.price.sentence() if self.price else ""

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned heads of one layer; those that the survey or the pass chooses are missing."""
        fixed = self.budget.fixed[index] if self.budget.fixed else None
        if fixed is not None and fixed.k_heads is not None and fixed.v_heads is not None:
            return {"k_heads": fixed.k_heads, "v_heads": fixed.v_heads}
        return {"kv_heads": self.heads[index]} if self.shared_out or not self.divisible else {}

    def totals(self) -> dict[str, Any]:
        """What equal heads cost, where a survey said so; nothing else changes beside cache and parameters."""
        return {} if self.price is None else {"equal_heads_cost": self.price.facts()}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention; of the mean layer where layers differ."""
        facts, hidden = self.facts, self.donor_config.hidden_size
        kept = math.ceil(sum(self.heads) / len(self.heads))
        width = facts.heads * facts.head_dim
        normed = {None: 0, "head": 2, "width": facts.heads + facts.kv_heads}[facts.qk_norm] * facts.head_dim
        read = (hidden + facts.input_bias) * (width + kept * facts.head_dim)
        return read + width * hidden + self._biased * hidden + normed

    def stored(self, attention: Any) -> dict[str, Tensor]:
        """The tensors of a converted attention; one matrix of q, k and v where the donor's own class has one."""
        state: dict[str, Tensor] = dict(attention.state_dict())
        if self.stock and family_of(self.donor_config).fused_qkv:
            state["qkv_proj.weight"] = torch.cat([state.pop(f"{name}_proj.weight") for name in "qkv"])
        return state

    def observe(self, attention: Any, inputs: Tensor, rotary: LayerRotary) -> Observed:
        """The weights of a donor's attention, and their statistics on the calibration text `inputs` (N, L, D)."""
        statistics = observe(
            attention, self.donor_config, inputs, rotary.embeddings, rotary.inv_freq, rotary.attention_scaling
        )
        weights = attention_weights(attention, self.facts)
        heads = Heads(weights, statistics, self.facts.scale * rotary.attention_scaling**2, self._biased)
        kept = self.budget.kept[attention.layer_idx] if self.budget.kept else ()
        return Observed(heads, output_bias(attention), norms(attention, self.facts), kept)

    def convert(
        self,
        statistics: Observed,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The attention of layer `index` with fewer heads, float32 on the embeddings' device, and its numbers and maps.

        Args:
            inputs, targets: (N, L, D), what the donor's attention reads and returns on calibration text.
        """
        device = position_embeddings[0].device
        if self.settings.fusion == "trained":
            return self._unfused(statistics, index, device)
        rows = max(1, PROBE_TOKENS[self.effort] // inputs.shape[1])
        probe, expected = inputs[-rows:].to(device), targets[-rows:].to(device)
        best: tuple[float, Any, FusedWeights] | None = None
        for keys, values in self._candidates(statistics, index):
            fused = fuse(statistics.heads, keys, values)
            module = self._module(fused.in_groups() if self.stock else fused, statistics, index, device)
            with torch.no_grad():
                error = relative_error(module(probe, position_embeddings)[0], expected)
            if best is None or error < best[0]:
                best = (error, module, fused)
        assert best is not None
        _, module, fused = best
        self._set(index, module.keys.head_map, module.values.head_map)
        counts = {"k_heads": module.keys.count, "v_heads": module.values.count} | statistics.protected
        return module, counts | {"k_map": fused.k_map, "v_map": fused.v_map}  # of the donor's query heads

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        if self.settings.fusion == "trained":
            self._set_unfused(index, chosen["k_map"], chosen["v_map"])
        else:
            self._set(index, chosen["k_map"], chosen["v_map"])

    def finish(self) -> Any:
        """The configuration of the converted model with the head maps of every layer."""
        if not self.stock:
            return copy.deepcopy(self.config)
        stock = copy.deepcopy(self.donor_config)
        stock.num_key_value_heads = self.heads[0] // 2
        return stock

    def example_config(self) -> Any:
        """A configuration of the planned size: half of a layer's heads are K heads, read by groups of neighbours."""
        for index, count in enumerate(self.heads):
            k_heads, v_heads = self.budget.halves(index, count)
            every = range(self.facts.heads)
            maps = [[h * n // self.facts.heads for h in every] for n in (k_heads, v_heads)]
            self._set(index, *maps)
        return self.finish()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result; the donor's own where all layers are alike."""
        kind: Any = type(self.donor_config)
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind] if self.stock else converted_class(kind)

    @property
    def _biased(self) -> bool:
        return bool(self.config.attention_output_bias)

    def _candidates(self, seen: Observed, index: int) -> list[tuple[list[Cluster], list[Cluster]]]:
        """The (key clusters, value clusters) to compare: those of least cost by closed form, cheapest first."""
        fixed = self.budget.fixed[index] if self.budget.fixed else None
        if fixed is not None and fixed.k_map is not None and fixed.v_map is not None:
            return [(clusters(fixed.k_map), clusters(fixed.v_map))]
        if self.facts.qk_norm:
            own = clusters(seen.heads.group)
            counts = [v_heads for _, v_heads in self.budget.splits(index, self.heads[index])]
            return [(own, seen.split("v", count, again)) for count in counts for again in self._regroups()]
        candidates = []
        for again in self._regroups():
            for k_heads, v_heads in self.budget.splits(index, self.heads[index]):
                if self.budget.equal:
                    if not again and self.facts.kv_heads % k_heads:
                        continue
                    keys = values = seen.split("kv", k_heads, again, equal=True)
                else:
                    keys, values = seen.split("k", k_heads, again), seen.split("v", v_heads, again)
                lost = sum(seen.lost("k", c) for c in keys) + sum(seen.lost("v", c) for c in values)
                candidates.append((lost, keys, values))
        candidates.sort(key=lambda one: one[0])
        return [(keys, values) for _, keys, values in candidates[: CANDIDATES[self.effort]]]

    def _regroups(self) -> list[bool]:
        """Whether query heads of one KV head may part; both where what measures better decides."""
        if self.settings.regroup is not None:
            return [self.settings.regroup]
        return [False, True] if self.facts.heads > max(EXACT_HEADS, self.facts.kv_heads) else [True]

    def _module(self, fused: FusedWeights, seen: Observed, index: int, device: torch.device) -> Any:
        """The attention module of layer `index` with the tensors of `fused`, and its maps in the configuration."""
        self._set(index, fused.k_map, fused.v_map)
        return assemble(fused, seen, self.config, self.facts, index, device)

    def _unfused(self, seen: Observed, index: int, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        """The layer whose heads training will fuse, into the clusters of least cost by closed form."""
        keys, values = self._candidates(seen, index)[0]
        module = self._module(aligned(seen.heads, keys, values), seen, index, device)
        maps = {"k_map": cluster_map(keys), "v_map": cluster_map(values)}
        self._set_unfused(index, **maps)
        return module, {"k_heads": len(keys), "v_heads": len(values)} | seen.protected | maps

    def _set_unfused(self, index: int, k_map: list[int], v_map: list[int]) -> None:
        """Write the maps of layer `index` before fusion into the configuration, and which heads become one."""
        (k_parts, k_fusion), (v_parts, v_fusion) = (
            parts(head_map, self.facts.head_map) for head_map in (k_map, v_map)
        )
        self._set(index, k_parts, v_parts)
        self.config.k_fusion[index], self.config.v_fusion[index] = k_fusion, v_fusion

    def _set(self, index: int, k_map: Sequence[int], v_map: Sequence[int]) -> None:
        """Write the head maps of layer `index` into the configuration."""
        self.config.k_head_map[index] = list(k_map)
        self.config.v_head_map[index] = list(v_map)


METHOD = DHA
