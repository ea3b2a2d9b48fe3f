"""Causal language models with latent attention whose tokens each use some of a layer's heads.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.

Shapes: B batch, T query tokens, S cached tokens, H heads, A of them active, r kv_lora_rank, p rotary key width,
n qk_nope_head_dim, v v_head_dim, D hidden_size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_moh_mla import __getattr__ as config_class
from .modeling_mla import LatentAttention, by_heads
from .modeling_mla import __getattr__ as donor_class
from .modeling_moh import MixtureOfHeadAttention, gated
from .routed_class import routed_class

# From how many on heads are left out on a CPU. With 9 and with 32 heads, of which a quarter is left out, a step takes
# up to a tenth longer with all in float32, and no longer in bfloat16; over fewer, choosing costs more than it saves.
LEAST_KEYS_OF_A_STEP = 2048


class RoutedLatentAttention(MixtureOfHeadAttention, LatentAttention):
    """Latent attention of whose heads a token has some. The cache is that of all.

    In absorbed form all heads of a token are rows of one product with the cached latents, so those that it has not are
    rows less. In prompts they are not computed either, as in `MixtureOfHeadAttention`.
    """

    own_mask = LatentAttention.own_mask  # type: ignore[assignment]

    def __init__(self, donor: nn.Module, config: Any, layer_idx: int):
        nn.Module.__init__(self)
        vars(self).update(vars(donor), _modules=dict(donor.named_children()))
        self.config, self.heads, self.kv_heads, self.head_dim = (
            config,
            self.num_heads,
            self.num_heads,
            self.v_head_dim,
        )
        self.route(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, head_dim] -> output [B, T, D], weights."""
        query = self.q_proj(hidden_states)
        active, gates = self.choice(hidden_states, query, position_embeddings)
        read = self.read(query, hidden_states, position_embeddings, attention_mask, past_key_values)
        if past_key_values is not None and self.can_absorb(hidden_states.shape[1], attention_mask):
            places = None if active is None else self.rows_of_a_step(read, active, attention_mask)
            if places is None:
                output, weights = self.absorbed_attention(*read, attention_mask)
            else:
                output, weights = self.absorbed_rows(*read, attention_mask, places), None
        elif active is not None and self.can_skip(read[0], read[2], attention_mask):
            key, value = self.padded_kv(*read[2:])
            query = torch.cat(read[:2], dim=-1)
            output, weights = self.active_attention(query, key, value, active, attention_mask), None
            output = output[..., : self.v_head_dim].flatten(2)
        else:
            output, weights = self.expanded_attention(*read, attention_mask, kwargs)
        output = gated(output.unflatten(-1, (self.heads, -1)), active, gates)
        return self.o_proj(output.flatten(2)), weights

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries [B, T, H (n + p)] alone: keys and values are read from the latents."""
        return (self.q_proj(hidden_states),)

    def rows_of_a_step(self, read: Any, active: Tensor, attention_mask: Any) -> Tensor | None:
        """The active heads [B, T, A], ascending; None where all are computed: few keys, or tokens with more heads."""
        row, count = read[2], self.heads - len(self.routed_units) + self.chosen
        if row.shape[2] < LEAST_KEYS_OF_A_STEP or not self.can_skip(read[0], row, attention_mask):
            return None
        if not bool((active.sum(-1) == count).all()):
            return None
        return active.nonzero()[:, -1].view(*active.shape[:2], count)

    def absorbed_rows(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        row: Tensor,
        k_rope: Tensor,
        scales: Tensor,
        attention_mask: Tensor | None,
        places: Tensor,
    ) -> Tensor:
        """`absorbed_attention` of the heads `places` [B, T, A] alone -> output [B, T, H v], 0 elsewhere."""
        batch, heads, length, _ = q_nope.shape
        row, count = row.squeeze(1), places.shape[-1]
        to_latent, to_value = self.up_maps(heads)

        def chosen(x: Tensor) -> Tensor:  # B H T w -> B (T A) w
            x = x.transpose(1, 2)
            return x.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])).flatten(1, 2)

        scores = self.scores(chosen(by_heads(q_nope * self.scaling, to_latent)), chosen(q_rope), row, k_rope)
        scores = scores.view(batch, length, count, -1)
        if self.num_key_scales:
            by_head = self.head_scales(scales).unsqueeze(2).expand(-1, -1, length, -1)  # B H T S
            scores = scores * chosen(by_head).view_as(scores)
        mask = None if attention_mask is None else attention_mask[..., : scores.shape[-1]].transpose(1, 2)
        scores = self.capped_and_masked(scores, mask, scores.dtype)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(k_rope.dtype)
        latent = torch.bmm(weights.flatten(1, 2), row).view(batch, length, count, -1)
        whole = latent.new_zeros(batch, length, heads, latent.shape[-1])
        whole.scatter_(2, places.unsqueeze(-1).expand_as(latent), latent)
        return by_heads(whole.transpose(1, 2), to_value.mT).transpose(1, 2).flatten(2)


def __getattr__(name: str) -> Any:
    """`MoHMLA<Donor>Model` and `MoHMLA<Donor>ForCausalLM`, made when they are asked for."""
    if not (name.startswith("MoHMLA") and name.endswith(("Model", "ForCausalLM"))):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    donor = donor_class(name.removeprefix("MoH"))
    return globals().setdefault(name, routed_class(name, donor, RoutedLatentAttention, config_class))
