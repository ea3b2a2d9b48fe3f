"""Causal language models whose attention caches one latent and one shared rotary key per token.

Each class is its donor's own transformers class with every `self_attn` replaced, so whatever is not attention
runs the donor's code. This file is shipped inside converted checkpoints: it imports torch, transformers and its
siblings only.

Shapes: B batch, T query tokens, S cached tokens, H heads, r kv_lora_rank, p rotary key width (two elements for
each rotary component, next to each other), n qk_nope_head_dim, v v_head_dim, D hidden_size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # the one that knows softcap

from . import configuration_mla
from .configuration_mla import LatentAttentionFields
from .slot_embeddings import SlotEmbeddings, rotated, turns


class HeadwiseLinear(nn.Module):
    """A linear map of its own for each head: [B, T, H, in] -> [B, H, T, out]; weight (H, out, in)."""

    def __init__(self, heads: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.transpose(1, 2), self.weight.mT)


class LatentAttention(nn.Module):
    """Multi-head latent attention without a norm in the latent (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the latent [B, 1, S, r] as its keys and the shared rotary key [B, 1, S, p] as its values.
    A few query tokens meet the cache in absorbed form; more of them expand it to per-head keys and values.

    With rope_in_latent, kv_b_proj reads latent and rotary key together, so the p elements serve values and non-rotary
    keys too, and the cache holds both in one row as its keys [B, 1, S, r + p]; its values are empty. The rotary key
    lies there before its rotation, and is rotated where it is read: scores depend on distances alone, and those are
    the distances of the cache's slots, less the slots that are masked out.

    A donor with QK-norm divides a key head by its RMS. That is one number for each token and head, so the latent and
    the rotary key stay linear in the hidden state, the cache's values end in k = num_key_scales numbers 1 / RMS, and
    each score is multiplied by its own: exact. `k_proj` is the donor's, read for its RMS alone; `q_proj` is the
    donor's too, and `q_b_proj` takes a head's normed query to latent and rotary widths.
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
        self.qk_nope_head_dim = config.nope_width(layer_idx)
        self.v_head_dim = config.v_head_dim
        self.scaling = config.softmax_scale or config.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.layer_window(layer_idx)
        self.qk_norm = config.qk_norm
        self.num_key_scales = config.num_key_scales
        self.rope_in_latent = config.rope_in_latent
        self.slot_embeddings: SlotEmbeddings | None = None  # of the model that this is a part of
        self.attention_dropout = config.attention_dropout
        query_width = self.qk_nope_head_dim + self.qk_rope_head_dim
        value_width = self.num_heads * self.v_head_dim
        biased, width = config.attention_input_bias, config.hidden_size
        if self.qk_norm is None:
            self.q_proj = nn.Linear(width, self.num_heads * query_width, bias=biased)
        else:
            head_dim = config.v_head_dim  # the donor's
            self.q_proj = nn.Linear(width, self.num_heads * head_dim, bias=biased)
            self.q_b_proj = HeadwiseLinear(self.num_heads, head_dim, query_width)
            self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=biased)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.kv_lora_rank + self.qk_rope_head_dim, bias=biased)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank + self.qk_rope_head_dim * self.rope_in_latent,
            self.num_heads * (self.qk_nope_head_dim + self.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(value_width, width, bias=config.attention_output_bias)

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
        read = self.read(query, hidden_states, position_embeddings, attention_mask, past_key_values)
        if past_key_values is not None and self.can_absorb(hidden_states.shape[1], attention_mask):
            output, weights = self.absorbed_attention(*read, attention_mask)
        else:
            output, weights = self.expanded_attention(*read, attention_mask, kwargs)
        return self.o_proj(output), weights

    def read(
        self,
        query: Tensor,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What q_proj gives -> q_nope [B, H, T, n], q_rope [B, H, T, p], and what `expand_kv` reads of the cache."""
        length = hidden_states.shape[1]
        widths = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        q_nope, q_rope = self.queries(query).split_with_sizes(widths, dim=-1)
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        scales = self.key_scales(hidden_states) if self.num_key_scales else row[..., :0]
        if not self.rope_in_latent:
            row, k_rope = row.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            by = turns(*position_embeddings, self.rope_frequencies)
            q_rope, k_rope = rotated(q_rope, by), rotated(k_rope, by)
            scales = torch.cat((k_rope, scales), dim=-1) if self.num_key_scales else k_rope
        if past_key_values is not None:
            self.require_rows(past_key_values)
            row, scales = past_key_values.update(row, scales, self.layer_idx)
        if self.rope_in_latent:
            k_rope = row[..., self.kv_lora_rank :]
            if row.shape[2] == length:
                of_queries = of_keys = turns(*position_embeddings, self.rope_frequencies)
            else:
                table = self.slots().components(row.shape[2], hidden_states, self.rope_frequencies)
                [of_queries], [of_keys] = self.cache_embeddings(
                    length, [table], past_key_values, attention_mask
                )
            q_rope, k_rope = rotated(q_rope, of_queries), rotated(k_rope, of_keys)
        else:
            k_rope, scales = scales.split([self.qk_rope_head_dim, self.num_key_scales], dim=-1)
        return q_nope, q_rope, row, k_rope, scales

    def expanded_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        row: Tensor,
        k_rope: Tensor,
        scales: Tensor,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention on per-head keys and values; arguments as `read` gives them -> output [B, T, H v], weights."""
        key, value = self.padded_kv(row, k_rope, scales)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_mask is None:
            attention_mask = self.own_mask(q_nope[:, 0], key.shape[2])
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        output, weights = attention(
            self,
            torch.cat((q_nope, q_rope), dim=-1),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return output[..., : self.v_head_dim].flatten(2), weights

    def queries(self, query: Tensor) -> Tensor:
        """What q_proj gives [B, T, …] -> [B, H, T, n + p]. H is counted: tensor parallelism divides it."""
        batch, length, _ = query.shape
        if self.qk_norm is None:
            width = self.qk_nope_head_dim + self.qk_rope_head_dim
            return query.view(batch, length, -1, width).transpose(1, 2)
        heads = query.view(batch, length, self.num_heads, -1)
        groups = query.view(batch, length, self.num_heads if self.qk_norm == "head" else 1, -1)
        return self.q_b_proj(heads * self.inverse_rms(groups))

    def key_scales(self, hidden_states: Tensor) -> Tensor:
        """1 / RMS of the donor's key: [B, T, D] -> [B, 1, T, k]."""
        batch, length, _ = hidden_states.shape
        key = self.k_proj(hidden_states).view(batch, length, self.num_key_scales, -1)
        return self.inverse_rms(key).squeeze(-1).unsqueeze(1)

    def inverse_rms(self, x: Tensor) -> Tensor:
        """What the donor's norm multiplies by: [..., width] -> [..., 1]."""
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.config.rms_norm_eps).to(x.dtype)

    def own_mask(self, hidden_states: Tensor, seen: int) -> Tensor | None:
        """The mask of a call without one, where sdpa's plain causal one would not do: [1, 1, T, seen]."""
        length, kind = hidden_states.shape[1], self.config._attn_implementation
        windowed = self.window is not None and self.window < seen
        if length == 1 or not (kind == "eager" or (kind == "sdpa" and windowed)):
            return None
        distance = torch.arange(seen - length, seen, device=hidden_states.device).unsqueeze(1)
        distance = distance - torch.arange(seen, device=hidden_states.device)
        visible = distance >= 0
        if windowed:
            visible = visible & (distance < self.window)
        lowest = torch.finfo(hidden_states.dtype).min
        return torch.zeros_like(visible, dtype=hidden_states.dtype).masked_fill(~visible, lowest)[None, None]

    def require_rows(self, cache: Any) -> None:
        """Raise ValueError for a cache that quantises keys and values itself, the latter being empty here."""
        if self.rope_in_latent and hasattr(next(iter(cache.layers[self.layer_idx :]), None), "_quantize"):
            raise ValueError(
                f"layer {self.layer_idx} caches one row for latent and rotary key, which transformers' QuantizedCache "
                "does not take; `mhconvert generate --kv-cache-dtype int4` quantises it"
            )

    def slots(self) -> SlotEmbeddings:
        if self.slot_embeddings is None:
            raise RuntimeError("a cache that holds tokens already can be read within a whole model only")
        return self.slot_embeddings

    def cache_embeddings(
        self, length: int, tables: Sequence[Tensor], cache: Any, attention_mask: Any
    ) -> tuple[Any, Any]:
        """Rotary tables [1, S, …] of a cache's slots, at its last `length` tokens [1 or B, T, …] and at all slots
        [1 or B, S, …].

        A mask [B, 1, T, S] numbers the slots that any query sees, as transformers numbers positions.
        """
        slots, seen = tables[0].shape[1], cache.get_seq_length(self.layer_idx)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            mask = attention_mask[:, 0, :, :slots]
            visible = (mask if mask.dtype == torch.bool else mask == 0).any(1)
            positions = (visible.cumsum(-1) - 1).clamp_min(0)
            tables = [table[0, positions] for table in tables]
        if isinstance(seen, Tensor):
            queries: Any = torch.arange(length, device=seen.device) + (seen.clamp(max=slots) - length)
        else:
            last = min(seen, slots)  # a window keeps fewer
            queries = slice(last - length, last)
        return [table[:, queries] for table in tables], tables

    def expand_kv(self, row: Tensor, k_rope: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, n + p] and values [B, H, S, v] from the cache.

        row: what kv_b_proj reads, [B, 1, S, r or r + p]; k_rope [B, 1, S, p] rotated; scales [B, 1, S, k].
        """
        batch, _, length, _ = k_rope.shape
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        expanded = self.kv_b_proj(row)
        expanded = expanded.view(batch, length, -1, sum(widths)).transpose(1, 2)
        k_nope, value = expanded.split(widths, dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        if self.num_key_scales:
            key = key * self.head_scales(scales).unsqueeze(-1)
        return key, value

    def padded_kv(self, row: Tensor, k_rope: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """`expand_kv` with values as wide as keys, as fused kernels want them: three times as fast as both widths."""
        key, value = self.expand_kv(row, k_rope, scales)
        return key, F.pad(value, (0, max(0, key.shape[-1] - self.v_head_dim)))

    def head_scales(self, scales: Tensor) -> Tensor:
        """Cached scales [B, 1, S, k] -> what each head's scores are multiplied by [B, H, S]."""
        return scales.squeeze(1).mT.repeat_interleave(self.num_heads // self.num_key_scales, dim=1)

    def can_absorb(self, length: int, attention_mask: Tensor | None) -> bool:
        """Whether the absorbed form can read the mask ([B, 1, T, S]; none for one token) and kv_b_proj's weight.

        An adapter, a quantised or a divided kv_b_proj is more than its weight, or less: it has to be called. Dropout
        is left to the kernels.
        """
        up = self.kv_b_proj
        plain = type(up) is nn.Linear and type(up.weight) is nn.Parameter and "_hf_hook" not in vars(up)
        plain = plain and not up._forward_hooks and not up._forward_pre_hooks
        plain = (
            plain and not (self.training and self.attention_dropout) and length <= self.max_absorbed_tokens
        )
        if attention_mask is None:
            return plain and length == 1  # more without a mask: the kernel knows which of them are causal
        return plain and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4

    def capped_and_masked(self, scores: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scores [B, H, T, S] with the donor's softcap; what a boolean mask hides gets the least number of `dtype`."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, torch.finfo(dtype).min)
        return scores + mask

    def absorbed_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        row: Tensor,
        k_rope: Tensor,
        scales: Tensor,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a few query tokens on the cache as it is, kv_b_proj folded into query and output.

        q_nope [B, H, T, n], q_rope [B, H, T, p]; row, k_rope, scales: as for `expand_kv`
        -> output [B, T, H v], weights [B, H, T, S].
        """
        batch, heads, length, _ = q_nope.shape
        row, (to_latent, to_value) = row.squeeze(1), self.up_maps(heads)
        q_latent = by_heads(q_nope * self.scaling, to_latent).reshape(batch, heads * length, -1)
        scores = self.scores(q_latent, q_rope.reshape(batch, heads * length, -1), row, k_rope)
        scores = scores.view(batch, heads, length, -1)
        if self.num_key_scales:
            scores = scores * self.head_scales(scales).unsqueeze(2)
        mask = None if attention_mask is None else attention_mask[..., : scores.shape[-1]]
        scores = self.capped_and_masked(scores, mask, scores.dtype)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(k_rope.dtype)
        output = torch.bmm(weights.flatten(1, 2), row).view(batch, heads, length, -1)
        return by_heads(output, to_value.mT).transpose(1, 2).flatten(2), weights

    def scores(self, q_latent: Tensor, q_rope: Tensor, row: Tensor, k_rope: Tensor) -> Tensor:
        """Scaled scores [B, N, S] of q_latent [B, N, r or r + p], scaled, and q_rope [B, N, p] on row and k_rope."""
        scores = torch.bmm(q_rope * self.scaling, k_rope.squeeze(1).mT)
        return torch.baddbmm(scores, q_latent, row.mT)

    def up_maps(self, heads: int) -> Any:
        """What kv_b_proj has for each head, from rows of the cache to keys and to values: (H, n, r), (H, v, r)."""
        maps = self.kv_b_proj.weight.view(heads, -1, self.kv_b_proj.in_features)
        return maps.split_with_sizes([self.qk_nope_head_dim, self.v_head_dim], dim=1)


def by_heads(x: Tensor, maps: Tensor) -> Tensor:
    """[B, H, T, in] -> [B, H, T, out] by a map of each head (H, in, out), which serves the tokens of all sequences.

    The factor that lies in memory row by row comes so to bmm, which takes half the time or less.
    """
    batch, heads, length, _ = x.shape
    tokens = x.transpose(0, 1).reshape(heads, batch * length, -1)
    products = torch.bmm(tokens, maps) if maps.stride(-1) == 1 else torch.bmm(maps.mT, tokens.mT).mT
    return products.view(heads, batch, length, -1).transpose(0, 1)


class LatentAttentionModel:
    """Mixed into the donor's decoder stack: replaces every `self_attn`, and keeps the rotary frequencies in float32."""

    def __init__(self, config: LatentAttentionFields):
        super().__init__(config)  # type: ignore[call-arg]
        kinds: Any = getattr(config, "layer_types", None) or [None] * len(self.layers)  # type: ignore[attr-defined]
        slots = {kind: SlotEmbeddings(self.rotary_emb, kind) for kind in set(kinds)}  # type: ignore[attr-defined]
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = LatentAttention(config, layer_idx)
            layer.self_attn.slot_embeddings = slots[kinds[layer_idx]]
        self.post_init()  # type: ignore[attr-defined]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Cast or move, then undo what a cast did to the rotary frequencies.

        In bfloat16 a frequency keeps 8 bits, and a phase is wrong after a few hundred tokens.
        """
        exact = {
            (module, name): buffer
            for module in self.modules()  # type: ignore[attr-defined]
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")  # some donors have one for each type of layer
        }
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for (module, name), frequencies in exact.items():
            cast = getattr(module, name)
            if cast.dtype != frequencies.dtype:
                setattr(module, name, frequencies.to(cast.device))
        return result


class LatentAttentionForCausalLM:
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def __init__(self, config: LatentAttentionFields):
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """`MLA<Donor>Model` and `MLA<Donor>ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("MLA"), None)
    if not (name.startswith("MLA") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_mla, f"MLA{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": LatentAttention}
        return globals().setdefault(name, type(name, (LatentAttentionModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"MLA{stack.__name__}")
    return globals().setdefault(name, type(name, (LatentAttentionForCausalLM, donor), body))
