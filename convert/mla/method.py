"""MLA as the pass sees it: plan, then one layer at a time, then the config of the result."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.convert.families import require
from mhconvert.convert.linalg import relative_error
from mhconvert.convert.mla import modeling_mla
from mhconvert.convert.mla.budget import LayerBudget, layer_budget
from mhconvert.convert.mla.settings import MLASettings
from mhconvert.convert.mla.statistics import attention_weights, observe
from mhconvert.convert.mla.surgery import (
    AttentionWeights,
    LatentWeights,
    LayerStatistics,
    RotaryBasis,
    convert_layer,
    kept_components,
    rotary_basis,
    series_components,
)

MODELS: dict[str, Any] = {
    "llama": modeling_mla.MLALlamaForCausalLM,
    "mistral": modeling_mla.MLAMistralForCausalLM,
}
VALUE_WEIGHT = 0.01  # price of a relative error in the values against one in the scores
VALUE_WEIGHTS = (0.003, 0.03)  # tried beside it
PROBE_TOKENS = {"quick": 1024, "default": 2048, "high": 4096}  # on which candidates are compared


@dataclass(frozen=True)
class Observed:
    """All of a donor layer that its conversions read, whatever their budgets; float64 on the CPU."""

    weights: AttentionWeights
    statistics: LayerStatistics
    basis: RotaryBasis


@dataclass(frozen=True)
class Candidate:
    """One way to spend a layer's budget."""

    components: int
    value_weight: float


class MLA:
    """Grouped-query or multi-head attention → latent attention (specified in `surgery`)."""

    replaced = ("self_attn.",)

    def __init__(self, config: Any, settings: MLASettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "mla")
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.budget: LayerBudget = layer_budget(config, settings)
        self.config = latent_config(config, settings.profile == "quality")

    def kv_elements(self) -> int:
        """Cache elements per token, all layers."""
        return self.budget.elements * self.donor_config.num_hidden_layers

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned sizes of one layer; the split is missing where the pass chooses it."""
        sizes = {"kv_lora_rank": self.budget.kv_lora_rank, "qk_rope_head_dim": self.budget.qk_rope_head_dim}
        return {"kv_elements": self.budget.elements} | {k: v for k, v in sizes.items() if v is not None}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention at its widest rotary key."""
        config = self.donor_config
        heads, head_dim, elements = config.num_attention_heads, config.head_dim, self.budget.elements
        rope = 2 * max(self.budget.component_choices(self.effort))
        rank = elements - 2 * min(self.budget.component_choices(self.effort))
        projections = heads * (head_dim + rope) + elements + heads * head_dim + 1
        return config.hidden_size * projections + 2 * rank * heads * head_dim

    def observe(
        self, attention: Any, inputs: Tensor, position_embeddings: tuple[Tensor, Tensor], rotary: Any
    ) -> Observed:
        """The weights of a donor's attention, and what `inputs` (N, L, D), its calibration text, says of them."""
        scaling = float(getattr(rotary, "attention_scaling", 1.0))
        statistics = observe(
            attention, self.donor_config, inputs, position_embeddings, rotary.inv_freq, scaling
        )
        weights = attention_weights(attention, self.donor_config)
        return Observed(weights, statistics, rotary_basis(weights, statistics))

    def convert(
        self,
        statistics: Observed,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The latent attention of layer `index`, fp32 on the embeddings' device, and what was chosen for it.

        inputs, targets (N, L, D): attention inputs and outputs of the donor's layer on calibration text.
        """
        device = position_embeddings[0].device
        rows = max(1, PROBE_TOKENS[self.effort] // inputs.shape[1])
        probe, expected = inputs[-rows:].to(device), targets[-rows:].to(device)
        best: tuple[float, Any, Candidate] | None = None
        components = self.budget.component_choices(self.effort)
        queue = [Candidate(count, VALUE_WEIGHT) for count in components]
        tried: set[Candidate] = set()
        while queue:
            candidate = queue.pop(0)
            tried.add(candidate)
            latent = self._surgery(statistics, candidate)
            module = self._module(latent, index, device)
            with torch.no_grad():
                error = relative_error(module(probe, position_embeddings)[0], expected)
            if best is None or error < best[0]:
                best = (error, module, candidate)
            if not queue and self.effort != "quick":
                around = (Candidate(best[2].components, weight) for weight in VALUE_WEIGHTS)
                queue = [c for c in around if c not in tried and len(tried) < len(components) + 2]
        assert best is not None
        _, module, chosen = best
        self._set(index, module.kv_lora_rank, module.rope_frequencies)
        return module, {
            "kv_lora_rank": module.kv_lora_rank,
            "qk_rope_head_dim": module.qk_rope_head_dim,
            "rope_frequencies": module.rope_frequencies,
            "value_weight": chosen.value_weight,
        }

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        self._set(index, chosen["kv_lora_rank"], chosen["rope_frequencies"])

    def finish(self) -> Any:
        """The configuration of the converted model, every layer's sizes filled in."""
        config = copy.deepcopy(self.config)
        ranks = set(config.kv_lora_rank)
        if self.settings.profile == "portable":
            assert len(ranks) == 1
            config.kv_lora_rank = ranks.pop()
        return config

    def example_config(self) -> Any:
        """A configuration of the planned size: a quarter of a layer's elements rotate, where the pass would choose."""
        choices = self.budget.component_choices("quick")
        components = min(choices, key=lambda count: abs(count - self.budget.elements / 8))
        frequencies = [index % self.budget.frequencies for index in range(components)]
        for index in range(self.donor_config.num_hidden_layers):
            self._set(index, self.budget.elements - 2 * components, frequencies)
        return self.finish()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result."""
        return MODELS[self.donor_config.model_type]

    @property
    def decoder_class(self) -> Any:
        """The same without its language-model head."""
        return self.model_class.decoder_class

    def _surgery(self, seen: Observed, choice: Candidate) -> LatentWeights:
        rank = self.budget.elements - 2 * choice.components
        if self.settings.profile == "portable":
            kept = series_components(seen.basis.damage, choice.components)
        else:
            kept = kept_components(seen.basis.damage, choice.components)
        bias = self.config.attention_output_bias
        return convert_layer(seen.weights, seen.statistics, seen.basis, kept, rank, choice.value_weight, bias)

    def _set(self, index: int, rank: int, frequencies: list[int]) -> None:
        self.config.kv_lora_rank[index] = rank
        self.config.rope_frequencies[index] = list(frequencies)

    def _module(self, latent: LatentWeights, index: int, device: torch.device) -> Any:
        rank = latent.kv_b_proj.shape[1]
        self._set(index, rank, latent.frequencies)
        with torch.device("meta"):
            module = modeling_mla.LatentAttention(copy.deepcopy(self.config), index)
        tensors = {
            "q_proj.weight": latent.q_proj,
            "kv_a_proj_with_mqa.weight": latent.kv_a_proj_with_mqa,
            "kv_b_proj.weight": latent.kv_b_proj,
            "o_proj.weight": latent.o_proj,
            "o_proj.bias": latent.o_bias,
        }
        if not self.config.attention_output_bias:
            del tensors["o_proj.bias"]
        state = {name: t.to(device, torch.float32).contiguous() for name, t in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)


def latent_config(donor_config: Any, output_bias: bool) -> Any:
    """The donor's configuration as that of its latent-attention class; each layer's sizes are still empty."""
    config_class = MODELS[donor_config.model_type].config_class
    values = donor_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"):
        values.pop(key, None)
    layers = donor_config.num_hidden_layers
    config = config_class(
        **values,
        kv_lora_rank=[0] * layers,
        rope_frequencies=[[] for _ in range(layers)],
        qk_nope_head_dim=donor_config.head_dim,
        v_head_dim=donor_config.head_dim,
        attention_output_bias=output_bias,
    )
    config._attn_implementation = "sdpa"
    return config


METHOD = MLA
