"""The method as the pass over the layers sees it: plan, then one layer at a time, then the configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mhconvert.convert.families.facts import attention_facts
from mhconvert.convert.methods.refusals import require
from mhconvert.convert.methods.registry import Method
from mhconvert.errors import BudgetError, UnsupportedError

from .settings import GQASettings
from .surgery import mean_pooled


class GQA(Method):
    """Fewer KV heads in every layer, in the donor's own class: nothing has to be shipped with a checkpoint."""

    replaced = ("self_attn.",)
    divisible = False  # the class has one number of KV heads for all layers
    survey_shares: tuple[float, ...] = ()

    def __init__(self, config: Any, settings: GQASettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        if require(config, "gqa").fused_qkv:
            raise UnsupportedError(
                f"gqa cannot convert a {config.model_type} model: its q, k and v are one matrix"
            )
        self.facts = attention_facts(config)
        whole = self.facts.kv_heads
        counts = [n for n in range(1, whole + 1) if whole % n == 0 and n <= settings.kv_budget * whole]
        if not counts:
            raise BudgetError(f"kv_budget={settings.kv_budget} leaves none of the donor's {whole} KV heads")
        self.config = copy.deepcopy(config)
        self.config.num_key_value_heads = self.kv_heads = counts[-1]

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result: the donor's own."""
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]

    def kv_elements(self) -> int:
        """Cache elements per token, all layers together."""
        return 2 * self.kv_heads * self.facts.head_dim * self.config.num_hidden_layers

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned sizes of one layer."""
        return {"num_key_value_heads": self.kv_heads}

    def totals(self) -> dict[str, Any]:
        """Nothing changes beside cache and parameters."""
        return {}

    def new_parameters(self) -> int:
        """Parameters of one layer's attention."""
        facts, hidden = self.facts, self.config.hidden_size
        width = facts.heads * facts.head_dim
        read = (hidden + facts.input_bias) * (width + 2 * self.kv_heads * facts.head_dim)
        return read + (width + facts.output_bias) * hidden

    def share_out(self, needs: Any) -> None:
        """Never called: the budget is not divisible."""

    def observe(self, attention: Any, inputs: Tensor, rotary: Any) -> Any:
        """The donor's attention itself: the closed form reads nothing of the text."""
        return attention

    def convert(
        self,
        statistics: Any,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[Any, dict[str, Any]]:
        """The attention of layer `index` with fewer KV heads, float32, and what was chosen for it."""
        config = copy.deepcopy(statistics.config)
        config.num_key_value_heads = self.kv_heads
        module = type(statistics)(config, index)
        state = dict(statistics.state_dict())
        for name in state:
            if name.startswith(("k_proj.", "v_proj.")):
                state[name] = mean_pooled(state[name], self.kv_heads, self.facts.head_dim)
        module.load_state_dict(state)
        module = module.to(position_embeddings[0].device, torch.float32).eval().requires_grad_(False)
        return module, {"num_key_value_heads": self.kv_heads}

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Nothing to take over: every layer has the planned size."""

    def finish(self) -> Any:
        """The configuration of the converted model."""
        return copy.deepcopy(self.config)

    def example_config(self) -> Any:
        """The same: all sizes are planned."""
        return self.finish()


METHOD = GQA
