"""Coded latents as the pass over the layers sees them: bits divided under one budget in bytes, then layer by layer.

Keys before RoPE and values of a layer are one vector, which a transform takes to components without correlation; each
is cached in 0 to 8 bits. The mathematics is in `code_basis`, `bit_allocation` and `code_levels`; what is cached is in
`latent_code`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.errors import BudgetError

from ...attention.projections import QKNorm, projections, qk_norm
from ...attention.rotary import LayerRotary
from ...families.facts import attention_facts
from ..layer_sensitivity import LayerSensitivity
from ..protected_heads import groups_of, head_weights, protected_heads
from ..refusals import require
from ..registry import Method
from . import modeling_coded_mla
from .bit_allocation import ANY, allocate, least_bytes, most_bytes, width_counts
from .code_basis import LayerBases
from .code_levels import layer_levels
from .code_plan import planned_bits
from .coded_class import coded_class, coded_config
from .latent_code import WIDTHS, row_bytes
from .settings import CodeSettings

BUDGET_BYTES = 2  # of a donor's cache element, of which the budget is a share
EXAMPLE_WIDTH = 4
LEAST_RMS = 1e-6  # of a token's components, by which they are divided


@dataclass(frozen=True)
class DonorAttention:
    """A donor layer's projections (weight, bias), float64 on the CPU, and the gains of its QK-norm."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    o: tuple[Tensor, Tensor]
    norm: QKNorm | None


class CodedMLA(Method):
    """Attention whose cache is the code of one latent a layer."""

    replaced = ("self_attn.",)
    closed_form = True
    layer_tokens = 1  # a row: the survey has kept what the levels are fitted to
    added_tensors = 11  # of six projections with biases, two norms and a code of three, where six were
    surveys_sensitivity = True
    survey_shares: tuple[float, ...] = ()

    def __init__(self, config: Any, settings: CodeSettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "mla")
        self.donor_config, self.settings, self.effort = config, settings, effort
        self.facts = attention_facts(config)
        layers = config.num_hidden_layers
        named = protected_heads(settings.protect, layers, self.facts.heads)
        self.kept = groups_of(named, self.facts.heads, self.facts.kv_heads)
        self.elements = self.facts.kv_elements
        whole = self.elements * layers * BUDGET_BYTES
        asked = int(settings.kv_budget * whole)
        self.widths = ANY if settings.kv_bits == "auto" else (int(settings.kv_bits),)
        self.budget = min(asked, most_bytes(layers, self.elements, max(self.widths)))
        self._require_budget(whole)
        if self.budget < asked:
            self.notice = (
                f"the budget of {asked:,} bytes a token is cut to {self.budget:,}, the most that "
                "its components can take"
            )
        self.config = coded_config(config)
        self.bases = LayerBases([])
        self.bits: list[Tensor] = []
        if settings.plan is not None:
            self._take_plan(settings.plan)

    def _take_plan(self, plan: Any) -> None:
        """Take over the bits of a user's plan. Raise BudgetError where it does not fit the donor or the budget."""
        tokens = [1] * self.donor_config.num_hidden_layers
        self.bits = planned_bits(plan, self.elements, self.widths, self.budget, tokens)

    def _require_budget(self, whole: int) -> None:
        """Raise BudgetError where the smallest codes are over the budget; whole: bytes of the donor."""
        layers = self.donor_config.num_hidden_layers
        least = least_bytes(layers, min(self.widths))
        if self.budget < least:
            raise BudgetError(
                f"kv_budget={self.settings.kv_budget:g} gives {self.budget} bytes a token, and its codes need at least "
                f"{least} in {layers} layers; the least is kv_budget={math.ceil(1e4 * least / whole) / 1e4:g}"
            )

    def kv_elements(self) -> int:
        """Cache elements of two bytes per token, all layers."""
        return -(-self.kv_bytes(BUDGET_BYTES) // BUDGET_BYTES)

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes per token, all layers: codes have the same size in every dtype."""
        return sum(self.layer_bytes() or [self.budget])

    def layer_bytes(self) -> list[int]:
        """Bytes of a token's row in each layer; empty before the budget is divided."""
        return [row_bytes(width_counts(bits)) for bits in self.bits]

    @property
    def divisible(self) -> bool:
        """The budget is always divided: which components have bits follows from the survey."""
        return True

    def share_out(self, sensitivities: Sequence[LayerSensitivity]) -> None:
        """Give every component of every layer its bits, under one water level for the whole model."""
        weights = [head_weights(kept, self.facts.kv_heads) if kept else None for kept in self.kept]
        self.bases = LayerBases(sensitivities, weights)
        if self.settings.plan is None:
            self.bits = allocate([basis.divergence for basis in self.bases], self.budget, self.widths)

    def layer_sizes(self, index: int) -> dict[str, Any]:
        """Bytes of a token's row, the latent's width, and how many components have how many bits, once divided."""
        if not self.bits:
            return {}
        counts = width_counts(self.bits[index])
        by_bits = {str(width): count for width, count in zip(WIDTHS, counts, strict=True) if count}
        return {
            "kv_code_bytes": row_bytes(counts),
            "kv_lora_rank": sum(counts),
            "components_by_bits": by_bits,
        }

    def totals(self) -> dict[str, Any]:
        """Nothing changes beside cache and parameters."""
        return {}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention at the full width of its latent."""
        facts, hidden = self.facts, self.donor_config.hidden_size
        key_value, query = self.elements, facts.heads * facts.head_dim
        return 2 * hidden * query + key_value * (hidden + key_value + 4)

    def observe(self, attention: Any, inputs: Tensor, rotary: LayerRotary) -> DonorAttention:
        """The projections of a donor's attention."""

        def exact(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            weight = weight.detach().cpu().double()
            return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu().double()

        q, k, v = (exact(*pair) for pair in projections(attention, self.facts))
        o = exact(attention.o_proj.weight, attention.o_proj.bias)
        return DonorAttention(q, k, v, o, qk_norm(attention, self.facts))

    def convert(
        self,
        statistics: DonorAttention,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The coded attention of layer `index`, float32 on the embeddings' device, and the bits of its components.

        Its levels are fitted to what the survey kept; `inputs` and `targets` are not read.
        """
        basis, bits = self.bases[index], self.bits[index]
        order = bits.argsort(descending=True, stable=True)[: int((bits > 0).sum())]
        mean, down, up = basis.mean, basis.down[order], basis.up[:, order]
        self._set(index, width_counts(bits))
        with torch.device("meta"):
            module = modeling_coded_mla.CodedLatentAttention(copy.deepcopy(self.config), index)
        sink = basis.first - mean
        rest = (basis.sample.double() - mean) @ down.mT
        rest = rest / rest.square().mean(-1, keepdim=True).sqrt().clamp_min(LEAST_RMS)
        tensors = {
            "code.sink": down @ sink,
            "code.levels": layer_levels(rest, module.code.ranges),
            "code.weight": basis.divergence[order] / basis.divergence[order].max(),
            **_projections(statistics, down, mean),
            "kv_b_proj.weight": torch.cat((up, sink.unsqueeze(1)), dim=1),
            "kv_b_proj.bias": mean,
        }
        wanted = module.state_dict().keys()
        state = {
            n: t.to(position_embeddings[0].device, torch.float32).contiguous()
            for n, t in tensors.items()
            if n in wanted
        }
        module.load_state_dict(state, strict=True, assign=True)
        own = {"weighted_kv_heads": self.kept[index]} if self.kept[index] else {}
        return module.eval().requires_grad_(False), self.layer_sizes(index) | own

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        self._set(index, [chosen["components_by_bits"].get(str(width), 0) for width in WIDTHS])

    def finish(self) -> Any:
        """The configuration of the converted model with the counts of every layer."""
        return copy.deepcopy(self.config)

    def example_config(self) -> Any:
        """A configuration of the planned size: four bits for as many components as there are bytes, or more for all."""
        layers = self.donor_config.num_hidden_layers
        bits = 8 * (self.budget // layers - 1)
        width = min(max(self.widths), max(EXAMPLE_WIDTH, *self.widths[:1], bits // self.elements))
        count = min(self.elements, max(1, bits // width))
        for index in range(layers):
            self._set(index, [count * (width == each) for each in WIDTHS])
        return self.finish()

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result."""
        return coded_class(type(self.donor_config))

    def _set(self, index: int, counts: list[int]) -> None:
        self.config.kv_code_counts[index] = counts


def _projections(donor: DonorAttention, down: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """The tensors that read a hidden state, and o_proj. Without QK-norm `down` is part of the donor's k and v."""
    weights = {"q_proj": donor.q, "o_proj": donor.o}
    norms = {}
    if donor.norm is None:
        weight, bias = (torch.cat(parts) for parts in zip(donor.k, donor.v, strict=True))
        weights["kv_a_proj_with_mqa"] = down @ weight, down @ (bias - mean)
    else:
        weights |= {"k_proj": donor.k, "v_proj": donor.v, "kv_a_proj_with_mqa": (down, -down @ mean)}
        norms = {"q_norm.weight": donor.norm.q.flatten(), "k_norm.weight": donor.norm.k.flatten()}
    tensors: dict[str, Tensor] = {}
    for name, (weight, bias) in weights.items():
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return tensors | norms
