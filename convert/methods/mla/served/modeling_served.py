"""Causal language models with latent attention in the form that serving engines know it by.

Each class is its donor's own transformers class with every `self_attn` replaced. vLLM's Transformers backend finds a
latent cache by the attention's structure: one norm over a part of what one projection of the hidden state gives, one
call that expands latent and rotary key to keys and values, one call of the attention interface. `forward` is written
to that form; what else it did would cost the small cache. This file is shipped inside exported checkpoints: it
imports torch, transformers and its siblings only.

Shapes: B batch, T query tokens, S cached tokens, H heads, r kv_lora_rank, p qk_rope_head_dim (two elements for each
rotary pair, next to each other), n qk_nope_head_dim, v v_head_dim, D hidden_size.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from . import configuration_served
from .configuration_served import ServedLatentFields


class LatentRMSNorm(nn.Module):
    """weight · x / sqrt(mean(x²) + eps). With weight = sqrt(eps) and mean(x²) far below eps that is x."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normed).to(x.dtype)  # before the weight a float16 would be too small


class ServedLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the normed latent [B, 1, S, r] as its keys and the rotated shared key [B, 1, S, p] as its values.
    """

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.rope_frequencies = config.layer_frequencies(layer_idx)
        self.scaling = config.softmax_scale
        self.attention_dropout = config.attention_dropout
        biased, width = config.attention_input_bias, config.hidden_size
        query_width, row = config.qk_head_dim, self.kv_lora_rank + self.qk_rope_head_dim
        self.q_proj = nn.Linear(width, self.num_heads * query_width, bias=biased)
        self.kv_a_proj_with_mqa = nn.Linear(width, row, bias=biased)
        self.kv_a_layernorm = LatentRMSNorm(self.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, width, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, rotary width] -> output [B, T, D], weights.

        Heads are counted: tensor parallelism divides them.
        """
        batch, length = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states)
        query = query.view(batch, length, -1, self.qk_nope_head_dim + self.qk_rope_head_dim).transpose(1, 2)
        q_nope, q_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        cos, sin = position_embeddings
        cos, sin = cos[..., self.rope_frequencies].unsqueeze(1), sin[..., self.rope_frequencies].unsqueeze(1)
        q_rot, k_rot = rotated(q_rot, cos, sin), rotated(k_rot.unsqueeze(1), cos, sin)

        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)

        key, value = self.expand_kv(latent, k_rot)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            torch.cat((q_nope, q_rot), dim=-1),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def expand_kv(self, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, 1, S, r], k_rot [B, 1, S, p] -> keys [B, H, S, n + p] and values [B, H, S, v]."""
        batch, _, length, _ = latent.shape
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        expanded = self.kv_b_proj(latent).view(batch, length, -1, sum(widths)).transpose(1, 2)
        k_nope, value = expanded.split(widths, dim=-1)
        key = torch.cat((k_nope, k_rot.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        return key, value


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x [B, heads, T, p], the two elements of a pair side by side, by cos and sin [B, 1, T, p / 2]."""
    left, right = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class ServedLatentModel:
    """Mixed into the donor's decoder stack: replaces every `self_attn`, and the rotary embedding by its own."""

    rotary_emb: Any

    def __init__(self, config: ServedLatentFields):
        super().__init__(config)  # type: ignore[call-arg]
        self.rotary_emb = type(self.rotary_emb)(config.rotary_config())
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = ServedLatentAttention(config, layer_idx)
        self.post_init()  # type: ignore[attr-defined]


class ServedLatentForCausalLM:
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def __init__(self, config: ServedLatentFields):
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """`MLAServed<Donor>Model` and `…ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("MLAServed"), None)
    if not (name.startswith("MLAServed") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_served, f"MLAServed{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": ServedLatentAttention}
        return globals().setdefault(name, type(name, (ServedLatentModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"MLAServed{stack.__name__}")
    return globals().setdefault(name, type(name, (ServedLatentForCausalLM, donor), body))
