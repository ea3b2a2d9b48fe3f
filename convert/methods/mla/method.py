"""MLA as the pass over the layers sees it: plan, then one layer at a time, then the configuration of the result."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.errors import UnsupportedError

from ...attention.linalg import relative_error
from ...attention.projections import attention_weights, output_bias, qk_norm
from ...attention.rotary import LayerRotary
from ...attention.statistics import observe
from ...families.facts import attention_facts
from ..budget_division import LayerNeed, divide
from ..layer_fits import BOTTLENECKS, LATENT_STEPS
from ..protected_heads import head_weights, protected_heads
from ..refusals import require, served_refusal
from ..registry import Method
from . import modeling_mla
from .assembly import at_mean_scale, module_tensors
from .budget import DIVISION, LayerBudget, layer_budget
from .coded_method import CodedMLA
from .converted_class import converted_class, latent_config
from .observed import Observed
from .rotary_components import kept_components, rotary_basis, series_components
from .score_rank import SCORE_LOSS
from .settings import MLASettings
from .surgery import LatentWeights, convert_layer

SURVEY_SHARES = (1 / 8, 3 / 16, 5 / 16, 1 / 2, 3 / 4)  # of the donor's cache elements of a layer
VALUE_WEIGHT = 0.01  # weight of a relative error in the values against one in the scores
VALUE_WEIGHTS = (0.003, 0.03)  # tried beside it
# Tokens on which candidates for a layer are compared, by effort.
PROBE_TOKENS = {"survey": 512, "quick": 1024, "default": 2048, "high": 4096}


@dataclass(frozen=True)
class Candidate:
    """One way to spend a layer's budget.

    Attributes:
        components: rotary components R; the rotary key has 2R elements.
        value_weight: of a relative error in the values against one in the scores.
    """

    components: int
    value_weight: float


class MLA(Method):
    """Grouped-query or multi-head attention → latent attention; the mathematics is in `surgery`."""

    replaced = ("self_attn.",)
    fit_steps, fit_options = LATENT_STEPS, BOTTLENECKS

    def __init__(self, config: Any, settings: MLASettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "mla")
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.facts = attention_facts(config)
        reason = served_refusal(config) if settings.profile == "portable" else None
        if reason is not None:
            raise UnsupportedError(f"profile portable cannot hold this donor: {reason}; use quality")
        self.protected = protected_heads(settings.protect, config.num_hidden_layers, self.facts.heads)
        self.budget: LayerBudget = layer_budget(config, settings)
        self.notice = self.budget.notice
        self.budgets, self.shared_out = [self.budget] * config.num_hidden_layers, False
        quality = settings.profile == "quality"
        bias = quality or self.facts.output_bias
        self.config = latent_config(config, output_bias=bias, rope_in_latent=quality)

    def kv_elements(self) -> int:
        """Cache elements per token, all layers."""
        return sum(budget.elements for budget in self.budgets)

    @property
    def divisible(self) -> bool:
        """Whether layers may have budgets of their own: sizes are not fixed, and the effort allows a survey."""
        free = self.budget.kv_lora_rank is None and self.budget.elements < self.budget.donor_elements
        return free and self.effort in ("default", "high")

    @property
    def survey_shares(self) -> tuple[float, ...]:
        """Shares of the donor's cache elements of a layer at which a survey measures it."""
        return SURVEY_SHARES

    def share_out(self, needs: Sequence[LayerNeed]) -> None:
        """Divide the budget over the layers by their measured needs, one for each."""
        whole, (least, most) = self.budget.donor_elements, self.budget.limits
        unit = max(1, whole // DIVISION)
        elements = divide(needs, self.kv_elements(), least, most, unit, whole)
        self.budgets = [replace(self.budget, elements=count) for count in elements]
        self.shared_out = True

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned sizes of one layer; those that the survey or the pass chooses are missing."""
        budget = self.budgets[index]
        sizes = {
            "kv_elements": budget.elements if self.shared_out or not self.divisible else None,
            "kv_lora_rank": budget.kv_lora_rank,
            "qk_rope_head_dim": budget.qk_rope_head_dim,
        }
        return {name: size for name, size in sizes.items() if size is not None}

    def totals(self) -> dict[str, Any]:
        """Nothing changes beside cache and parameters."""
        return {}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention at its widest keys; of the mean layer where layers differ."""
        hidden, together = self.donor_config.hidden_size, self.config.rope_in_latent
        return self.budget.most_parameters(self.facts, hidden, self.effort, together)

    def observe(self, attention: Any, inputs: Tensor, rotary: LayerRotary) -> Observed:
        """The weights of a donor's attention, and their statistics on the calibration text `inputs` (N, L, D)."""
        statistics = observe(
            attention, self.donor_config, inputs, rotary.embeddings, rotary.inv_freq, rotary.attention_scaling
        )
        plain, norm = attention_weights(attention, self.facts), qk_norm(attention, self.facts)
        named = self.protected[attention.layer_idx]
        plain = replace(plain, weight=head_weights(named, self.facts.heads)) if named else plain
        weights = at_mean_scale(plain, norm, self.facts, statistics)
        return Observed(weights, output_bias(attention), statistics, rotary_basis(weights.linear, statistics))

    def convert(
        self,
        statistics: Observed,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The latent attention of layer `index`, float32 on the embeddings' device, and the sizes chosen for it.

        Args:
            inputs, targets: (N, L, D), what the donor's attention reads and returns on calibration text.
        """
        device, rows = position_embeddings[0].device, max(1, PROBE_TOKENS[self.effort] // inputs.shape[1])
        probe, expected = inputs[-rows:].to(device), targets[-rows:].to(device)
        best: tuple[float, Any, Candidate] | None = None
        components = self.budgets[index].component_choices(self.effort)
        queue = [Candidate(count, VALUE_WEIGHT) for count in components]
        tried: set[Candidate] = set()
        while queue:
            candidate = queue.pop(0)
            tried.add(candidate)
            module = self._module(self._surgery(statistics, index, candidate), statistics, index, device)
            with torch.no_grad():
                error = relative_error(module(probe, position_embeddings)[0], expected)
            if best is None or error < best[0]:
                best = (error, module, candidate)
            if not queue and self.effort in ("default", "high"):
                around = (Candidate(best[2].components, weight) for weight in VALUE_WEIGHTS)
                queue = [c for c in around if c not in tried and len(tried) < len(components) + 2]
        assert best is not None
        _, module, chosen = best
        self._set(index, module.kv_lora_rank, module.rope_frequencies, module.qk_nope_head_dim)
        return module, {
            "kv_lora_rank": module.kv_lora_rank,
            "qk_rope_head_dim": module.qk_rope_head_dim,
            "qk_nope_head_dim": module.qk_nope_head_dim,
            "rope_frequencies": module.rope_frequencies,
            "value_weight": chosen.value_weight,
            **({"weighted_heads": self.protected[index]} if self.protected[index] else {}),
        }

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        self._set(index, chosen["kv_lora_rank"], chosen["rope_frequencies"], chosen["qk_nope_head_dim"])

    def finish(self) -> Any:
        """The configuration of the converted model with the sizes of every layer."""
        config = copy.deepcopy(self.config)
        if self.settings.profile == "portable":  # layers are alike
            [config.kv_lora_rank] = set(config.kv_lora_rank)
            [config.qk_nope_head_dim] = set(config.qk_nope_head_dim)
        return config

    def example_config(self) -> Any:
        """A configuration of the planned size in which a quarter of a layer's elements are the rotary key."""
        choices = self.budget.component_choices("quick")
        components = min(choices, key=lambda count: abs(count - self.budget.elements / 8))
        frequencies = [index % self.budget.frequencies for index in range(components)]
        for index in range(self.donor_config.num_hidden_layers):
            self._set(index, self.budget.rank(components), frequencies, self.facts.head_dim)
        return self.finish()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result."""
        return converted_class(type(self.donor_config))

    def _surgery(self, seen: Observed, index: int, choice: Candidate) -> LatentWeights:
        """The closed form of layer `index` for one way to spend its budget."""
        rank = self.budgets[index].rank(choice.components)
        quality = self.settings.profile == "quality"
        kept = (kept_components if quality else series_components)(seen.basis.damage, choice.components)
        # A mean left out of the keys cancels in the softmax only where no norm scales them.
        bias = self.config.attention_output_bias and self.facts.qk_norm is None
        return convert_layer(
            seen.weights.linear,
            seen.statistics,
            seen.basis,
            kept,
            rank,
            choice.value_weight,
            bias,
            self.config.rope_in_latent,
            spread=not quality,
            score_loss=SCORE_LOSS if quality else None,
            # A softcap takes a constant for a larger score, and a norm's scales make it one that differs by token.
            constant_cancels=self.facts.qk_norm is None and self.facts.softcap is None,
        )

    def _set(self, index: int, rank: int, frequencies: list[int], nope_width: int) -> None:
        """Write the sizes of layer `index` into the configuration."""
        self.config.kv_lora_rank[index] = rank
        self.config.qk_nope_head_dim[index] = nope_width
        self.config.rope_frequencies[index] = list(frequencies)

    def _module(self, latent: LatentWeights, seen: Observed, index: int, device: torch.device) -> Any:
        """The attention module of layer `index` with the tensors of `latent`, float32 on `device`, in eval mode."""
        rotary = 2 * len(latent.frequencies)
        rank, width = len(latent.kv_a_proj_with_mqa) - rotary, latent.query_map.shape[1] - rotary
        self._set(index, rank, latent.frequencies, width)
        with torch.device("meta"):
            module = modeling_mla.LatentAttention(copy.deepcopy(self.config), index)
        tensors = module_tensors(latent, seen.weights, self.facts, seen.output_bias)
        if not self.config.attention_output_bias:
            del tensors["o_proj.bias"]
        state = {name: t.to(device, torch.float32).contiguous() for name, t in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)


def build(config: Any, settings: MLASettings, effort: str) -> Any:
    """The conversion that `settings` ask for: of 16-bit elements, or of codes."""
    return (CodedMLA if settings.coded else MLA)(config, settings, effort)


METHOD = build
