"""Causal language models whose attention caches one latent and one shared rotary key per token.

Each class is its donor's own transformers class with every `self_attn` replaced, so whatever is not attention
runs the donor's code. This file is shipped inside converted checkpoints: it imports torch, transformers and its
siblings only.

Shapes: B batch, T query tokens, S cached tokens, H heads, r kv_lora_rank, p rotary key width (two elements for
each rotary component), n qk_nope_head_dim, v v_head_dim, D hidden_size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, MistralForCausalLM, MistralModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from .configuration_mla import LatentAttentionFields, MLALlamaConfig, MLAMistralConfig


class LatentAttention(nn.Module):
    """Multi-head latent attention without a norm in the latent (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the latent [B, 1, S, r] as its keys and the rotated shared key [B, 1, S, p] as its values.
    A few query tokens meet the cache in absorbed form; more of them expand it to per-head keys and values.
    """

    num_key_value_groups = 1
    is_causal = True
    max_absorbed_tokens = 32  # a drafted continuation; with some 100 tokens expanding is as fast

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.latent_rank(layer_idx)
        self.rope_frequencies = config.layer_frequencies(layer_idx)
        self.qk_rope_head_dim = 2 * len(self.rope_frequencies)
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_width = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        value_width = self.num_heads * self.v_head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=False
        )
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(value_width, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, head_dim] -> output [B, T, D], weights."""
        batch, length, _ = hidden_states.shape
        query_width = (
            self.qk_nope_head_dim + self.qk_rope_head_dim
        )  # H is counted: tensor parallelism divides it
        query = self.q_proj(hidden_states).view(batch, length, -1, query_width).transpose(1, 2)  # B H T n+p
        q_nope, q_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rot = (
            self.kv_a_proj_with_mqa(hidden_states)
            .unsqueeze(1)
            .split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        )
        cos, sin = self.component_embeddings(position_embeddings)
        q_rot, k_rot = apply_rotary_pos_emb(q_rot, k_rot, cos, sin)

        if past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)
            if length <= self.max_absorbed_tokens and self.can_absorb(length, attention_mask):
                output, weights = self.absorbed_attention(q_nope, q_rot, latent, k_rot, attention_mask)
                return self.o_proj(output), weights

        key, value = self.expand_kv(latent, k_rot)
        # The fused kernels want values as wide as keys: three times as fast as the kernel that takes both widths.
        value = F.pad(value, (0, max(0, key.shape[-1] - self.v_head_dim)))
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
        output = output[..., : self.v_head_dim].reshape(batch, length, -1)
        return self.o_proj(output), weights

    def component_embeddings(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The donor's cos and sin [B, T, head_dim] at this layer's rotary components: [B, T, p], half-split.

        The frequencies are Python integers, not a buffer: nothing is left uninitialised by `from_pretrained` or
        rounded by `.to(torch.bfloat16)`.
        """
        both_halves = self.rope_frequencies * 2
        cos, sin = position_embeddings
        return cos[..., both_halves], sin[..., both_halves]

    def expand_kv(self, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, 1, S, r] and rotary key [B, 1, S, p] -> keys [B, H, S, n + p], values [B, H, S, v]."""
        batch, _, length, _ = latent.shape
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        expanded = self.kv_b_proj(latent).view(batch, length, -1, sum(widths)).transpose(1, 2)
        k_nope, value = expanded.split(widths, dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, k_nope.shape[1], -1, -1)), dim=-1), value

    def can_absorb(self, length: int, attention_mask: Tensor | None) -> bool:
        """Whether the absorbed form can read the mask ([B, 1, T, S]; none for one token) and kv_b_proj's weight.

        An adapter, a quantised or a divided kv_b_proj is more than its weight, or less: it has to be called. Dropout
        is left to the kernels.
        """
        up = self.kv_b_proj
        plain = type(up) is nn.Linear and type(up.weight) is nn.Parameter and not hasattr(up, "_hf_hook")
        plain = plain and not up._forward_hooks and not up._forward_pre_hooks
        plain = plain and not (self.training and self.attention_dropout)
        if attention_mask is None:
            return plain and length == 1  # more without a mask: the kernel knows which of them are causal
        return plain and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4

    def absorbed_attention(
        self, q_nope: Tensor, q_rot: Tensor, latent: Tensor, k_rot: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of a few query tokens on the cache as it is, kv_b_proj folded into query and output.

        q_nope [B, H, T, n], q_rot [B, H, T, p], latent [B, 1, S, r], k_rot [B, 1, S, p]
        -> output [B, T, H v], weights [B, H, T, S].
        """
        heads, length = q_nope.shape[1:3]
        weight = self.kv_b_proj.weight.view(heads, -1, self.kv_lora_rank)
        k_up, v_up = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)  # H n r, H v r
        latent, k_rot = latent.squeeze(1), k_rot.squeeze(1)
        # Heads and tokens are rows of one product, as all of them read the same cache.
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, k_up).flatten(1, 2)
        rotary_scores = torch.bmm(q_rot.flatten(1, 2), k_rot.mT)
        scores = torch.baddbmm(rotary_scores, q_latent, latent.mT, beta=self.scaling, alpha=self.scaling)
        scores = scores.unflatten(1, (heads, length))  # B H T S
        if attention_mask is not None:
            mask = attention_mask[..., : scores.shape[-1]]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(latent.dtype)
        output = torch.bmm(weights.flatten(1, 2), latent).unflatten(1, (heads, length))
        return torch.einsum("bhtr,hvr->bthv", output, v_up).flatten(2), weights


class LatentAttentionModel:
    """Mixed into the donor's decoder stack: replaces every `self_attn`, and keeps the rotary frequencies in float32."""

    def __init__(self, config: LatentAttentionFields):
        super().__init__(config)  # type: ignore[call-arg]
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = LatentAttention(config, layer_idx)
        self.post_init()  # type: ignore[attr-defined]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Cast or move, then undo what a cast did to the rotary frequencies.

        In bfloat16 a frequency keeps 8 bits, and a phase is wrong after a few hundred tokens.
        """
        exact = {
            module: module.inv_freq
            for module in self.modules()  # type: ignore[attr-defined]
            if isinstance(getattr(module, "inv_freq", None), Tensor)
        }
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for module, frequencies in exact.items():
            if module.inv_freq.dtype != frequencies.dtype:
                module.inv_freq = frequencies.to(module.inv_freq.device)
        return result


class MLALlamaModel(LatentAttentionModel, LlamaModel):
    config_class = MLALlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LatentAttention}


class MLALlamaForCausalLM(LlamaForCausalLM):
    config_class = MLALlamaConfig
    decoder_class = MLALlamaModel

    def __init__(self, config: MLALlamaConfig):
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.post_init()


class MLAMistralModel(LatentAttentionModel, MistralModel):
    config_class = MLAMistralConfig
    _can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": LatentAttention}


class MLAMistralForCausalLM(MistralForCausalLM):
    config_class = MLAMistralConfig
    decoder_class = MLAMistralModel

    def __init__(self, config: MLAMistralConfig):
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.post_init()
