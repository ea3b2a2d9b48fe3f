"""Causal language models whose tokens each use some of a layer's heads.

Each class is its donor's own transformers class with every `self_attn` wrapped: projections, norms and rotary are the
donor's modules under their own names. This file is shipped inside converted checkpoints: it imports torch,
transformers and its siblings only.

Shapes: B batch, T query tokens, S cached tokens, H query heads, G KV heads, d head_dim, D hidden_size.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # the one that knows partial rotation

from . import configuration_moh
from .configuration_moh import MixtureOfHeadFields
from .head_router import HeadRouter, is_one_token

# From how many keys on it is worth while (two CPU cores): to leave heads out of a prompt, of a decoding step, and to
# read a KV head for some rows of a batch only.
LEAST_KEYS, LEAST_KEYS_OF_A_STEP, LEAST_KEYS_OF_A_ROW = 1024, 4096, 8192
# The kernel behind sdpa on a CPU, which also tells the logarithm of a softmax's denominator; None: a torch without it.
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class MixtureOfHeadAttention(nn.Module):
    """A donor's attention in which every token has the outputs of some heads only; keys and values are those of all.

    Without gradients, heads that a token has not are not computed, and not read where no token of a step has them. With
    gradients all are: in training (`train()`) a head that was not chosen can make its score learn.
    """

    o_proj: nn.Linear

    def __init__(self, donor: nn.Module, config: Any, layer_idx: int):
        nn.Module.__init__(self)
        for name, part in donor.named_children():
            self.add_module(name, part)
        functions = vars(sys.modules[type(donor).__module__])
        self.donor_rotary: Callable = functions["apply_rotary_pos_emb"]
        self.donor_eager: Callable = functions["eager_attention_forward"]
        self.is_causal, self.config, self.layer_idx = True, config, layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = config.softmax_scale or self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.layer_window(layer_idx)
        self.attention_dropout = config.attention_dropout
        self.route(config, layer_idx)

    def route(self, config: Any, layer_idx: int) -> None:
        """Add the router of a layer that has something to choose."""
        _, self.routed_units, self.chosen = config.layer_routing(layer_idx)
        self.unit_size = self.heads // config.routing_units
        if 0 < self.chosen < len(self.routed_units):
            self.router = HeadRouter(config, layer_idx)
        self.whole_start = config.whole_start and hasattr(self, "router")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, d] -> output [B, T, D], weights."""
        raw, key, value = self.projections(hidden_states)
        active, gates = self.choice(hidden_states, raw, position_embeddings)
        query, key = self.normed(raw, key)
        partial = position_embeddings[0].shape[-1] < self.head_dim
        query, key = (apply_rotary_pos_emb if partial else self.donor_rotary)(
            query, key, *position_embeddings
        )
        output, weights = self.attention(query, key, value, active, attention_mask, past_key_values, kwargs)
        return self.o_proj(gated(output, active, gates).flatten(2)), weights

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        active: Tensor | None,
        attention_mask: Any,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs [B, T, H, d], whatever where a head is not active, and weights; the cache is updated."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if active is not None and self.can_skip(query, key, attention_mask):
            return self.active_attention(query, key, value, active, attention_mask), None
        return self.dense_attention(query, key, value, attention_mask, kwargs)

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries [B, T, H d] and keys [B, T, G d] before any norm, values [B, G, T, d]."""
        maps: Any = self
        if "qkv_proj" in self._modules:
            sizes = [self.head_dim * count for count in (self.heads, self.kv_heads, self.kv_heads)]
            query, key, value = maps.qkv_proj(hidden_states).split(sizes, dim=-1)
        else:
            query, key, value = (p(hidden_states) for p in (maps.q_proj, maps.k_proj, maps.v_proj))
        return query, key, self.by_head(value)

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, d] and keys [B, G, T, d] as they are rotated: over the width or each head, as the donor."""
        if "q_norm" not in self._modules:
            return self.by_head(query), self.by_head(key)
        norms: Any = self
        if norms.q_norm.weight.numel() != self.head_dim:
            return self.by_head(norms.q_norm(query)), self.by_head(norms.k_norm(key))
        return norms.q_norm(self.by_head(query)), norms.k_norm(self.by_head(key))

    def by_head(self, x: Tensor) -> Tensor:
        """[B, T, n d] -> [B, n, T, d]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def choice(
        self, hidden_states: Tensor, query: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """`routing`, and all heads for the token at position 0 where the model says so."""
        active, gates = self.routing(hidden_states, query)
        if active is None or not self.whole_start:
            return active, gates
        # The later tokens attend to the first one, and what makes it their sink may be any of its heads. Only its
        # angles are zero; the fastest is, as the first one, no multiple of π at any other position.
        start = position_embeddings[1][..., :1] == 0
        if is_one_token(start) and not start:
            return active, gates
        return active | start, None if gates is None else gates.masked_fill(start, 1)

    def routing(self, hidden_states: Tensor, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which heads are active [B, T, H] (None: all) and their gates (None: 1 where they are)."""
        if self.chosen == len(self.routed_units):
            return None, None
        if hasattr(self, "router"):
            active, gates = self.router(hidden_states, query)
        else:  # no routed unit is ever chosen
            fixed = [unit not in self.routed_units for unit in range(self.config.routing_units)]
            shared = torch.tensor(fixed, device=hidden_states.device)
            active, gates = shared.expand(*hidden_states.shape[:2], -1), None
        size = self.unit_size
        if size > 1:
            active = active.repeat_interleave(size, dim=-1)
            gates = None if gates is None else gates.repeat_interleave(size, dim=-1)
        return active, gates

    def dense_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """All heads, as the donor computes them: output [B, T, H, d], weights."""
        kind = self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, self.donor_eager)
        if attention_mask is None:
            attention_mask = self.own_mask(query, key.shape[2])
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        return attention(self, query, key, value, attention_mask, sliding_window=self.window, **kwargs)

    def can_skip(self, query: Tensor, key: Tensor, attention_mask: Any) -> bool:
        """Whether `active_attention` does what sdpa does here, and is worth it: on a CPU, a prompt of enough keys."""
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (
            plain
            and not (self.training and self.attention_dropout)
            and (query.device.type, self.config._attn_implementation) == ("cpu", "sdpa")
            and (query.shape[2] == 1 or key.shape[2] >= LEAST_KEYS)
            and (attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1))
        )

    def active_attention(
        self, query: Tensor, key: Tensor, value: Tensor, active: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The active (token, head) pairs alone: query [B, H, T, d], key and value [B, G, S, d], active [B, T, H],
        attention_mask [B or 1, 1, T, S] -> [B, T, H, d], whatever where a head is not active.

        Heads that every token has go to the usual kernel. Of the others each KV head meets the queries that read it in
        the order of their tokens, and no further than the last of them sees. A KV head that none reads is not touched,
        but in steps over few keys.
        """
        batch, _, length, _ = query.shape
        if length == 1:
            return self.active_step(query, key, value, active, attention_mask)
        output = value.new_zeros(batch, length, self.heads, value.shape[-1])
        size, every = self.num_key_value_groups, active.flatten(0, 1).all(0)
        if attention_mask is None and self.window is not None:
            every = torch.zeros_like(every)
        if len(chosen := every.nonzero().flatten()):
            given = query[:, chosen], key[:, chosen // size], value[:, chosen // size], attention_mask
            causal = attention_mask is None
            found = F.scaled_dot_product_attention(*given, is_causal=causal, scale=self.scaling)
            output[:, :, chosen] = found.transpose(1, 2).to(output.dtype)
        for row in range(batch):
            mask = None if attention_mask is None else attention_mask[row % len(attention_mask), 0]
            for kv_head in range(self.kv_heads):
                heads = slice(kv_head * size, (kv_head + 1) * size)
                tokens, members = (active[row, :, heads] & ~every[heads]).nonzero(as_tuple=True)
                if len(tokens):
                    rows = query[row, heads][members, tokens]
                    # Without a mask these tokens begin the cache, which may have room behind them.
                    found = self.attend_rows(rows, key[row, kv_head], value[row, kv_head], tokens, mask)
                    output[row, tokens, members + heads.start] = found.to(output.dtype)
        return output

    def active_step(
        self, query: Tensor, key: Tensor, value: Tensor, active: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """`active_attention` of one token a row: the queries that share a KV head meet it together. Of a long cache it
        is read where a row needs it; over many keys, for the rows alone that do."""
        batch, seen, width = len(query), key.shape[2], value.shape[-1]
        if attention_mask is None and self.window is not None and self.window < seen:
            key, value = key[:, :, -self.window :], value[:, :, -self.window :]
        grouped = query.reshape(batch, self.kv_heads, -1, query.shape[-1]).to(key.dtype)  # B G size d
        needed = self.rows_to_read(active, seen) if seen >= LEAST_KEYS_OF_A_STEP else None
        if needed is None:
            found = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=self.scaling)
            return found.reshape(batch, 1, self.heads, width)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(batch, -1, -1, -1)

        def attend(rows: slice, heads: slice) -> Tensor:
            mask = None if attention_mask is None else attention_mask[rows]
            given = grouped[rows, heads], key[rows, heads], value[rows, heads], mask
            return F.scaled_dot_product_attention(*given, scale=self.scaling)

        output = value.new_zeros(grouped.shape)
        for kv_head, rows in enumerate(needed):
            heads = slice(kv_head, kv_head + 1)
            whole = len(rows) == len(query) or (rows and seen < LEAST_KEYS_OF_A_ROW)
            for part in [slice(None)] if whole else runs(rows):
                output[part, heads] = attend(part, heads).to(output.dtype)
        return output.flatten(1, 2).unsqueeze(1)

    def rows_to_read(self, active: Tensor, seen: int) -> list[list[int]] | None:
        """Of each KV head, the rows of a step that need it: active [B, 1, H]; None where nearly all do."""
        read = active[:, 0].unflatten(-1, (self.kv_heads, -1)).any(-1)  # B G
        needed = [[row for row, wanted in enumerate(column) if wanted] for column in read.T.tolist()]
        count = sum(map(len, needed))
        whole = seen < LEAST_KEYS_OF_A_ROW or 8 * count >= 7 * read.numel()
        return None if whole and all(needed) else needed

    def attend_rows(
        self, rows: Tensor, key: Tensor, value: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Queries [P, d] at ascending places [P] in the cache, key and value [S, d], mask [T, S] -> [P, d]."""
        found, size = [], 256 if len(key) < LEAST_KEYS_OF_A_STEP else 512
        value = value.to(key.dtype)  # autocast rotates keys to float32, and leaves values in 16 bits
        for part, places in zip(rows.to(key.dtype).split(size), positions.split(size), strict=True):
            if mask is not None:
                found.append(self.attend(part, key, value, mask[places]))
                continue
            # `known` keys are seen by all of these queries: those need no mask, where the two parts can be merged.
            known, last, first = int(places[0]), int(places[-1]) + 1, 0
            if self.window is not None:
                first, known = max(0, known - self.window + 1), 0
            merged = FLASH is not None and known > 0
            start = known if merged else first
            visible = self.visible(places, start, last)
            bias = torch.zeros_like(visible, dtype=part.dtype).masked_fill_(~visible, -torch.inf)
            if merged:
                found.append(self.merged(part, key[:last], value[:last], bias))
            else:
                found.append(self.attend(part, key[start:last], value[start:last], bias))
        return torch.cat(found)

    def attend(self, rows: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Queries [P, d], key and value [S, d], mask [P, S] -> [P, d]."""
        rows, key, value, mask = (x[None, None] for x in (rows, key, value, mask))
        return F.scaled_dot_product_attention(rows, key, value, mask, scale=self.scaling)[0, 0]

    def merged(self, rows: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Queries [P, d], key and value [S, d], bias [P, N] of the last N keys; those before are seen by all rows."""
        known, flash = len(key) - bias.shape[1], cast(Any, FLASH)
        query, key, value, bias = (x[None, None] for x in (rows, key, value, bias))
        before, known_sum = flash(query, key[:, :, :known], value[:, :, :known], scale=self.scaling)
        if known_sum.shape != query.shape[:-1]:  # not the kernel that is known here
            return self.attend(rows, key[0, 0], value[0, 0], F.pad(bias[0, 0], (known, 0)))
        own, own_sum = flash(
            query, key[:, :, known:], value[:, :, known:], attn_mask=bias, scale=self.scaling
        )
        share = (known_sum - own_sum).sigmoid().unsqueeze(-1)
        return torch.lerp(own.to(share.dtype), before.to(share.dtype), share)[0, 0]

    def visible(self, places: Tensor, first: int, last: int) -> Tensor:
        """[P, last - first]: whether a key lies before or at a query's place, and inside its window."""
        distance = places.unsqueeze(1) - torch.arange(first, last, device=places.device)
        return (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)

    def own_mask(self, query: Tensor, seen: int) -> Tensor | None:
        """The mask of a call without one, where sdpa's plain causal one would not do: [1, 1, T, seen]."""
        length, kind = query.shape[2], self.config._attn_implementation
        windowed = self.window is not None and self.window < seen
        if length == 1 or not (kind == "eager" or (kind == "sdpa" and windowed)):
            return None
        visible = self.visible(torch.arange(seen - length, seen, device=query.device), 0, seen)
        lowest = torch.finfo(query.dtype).min
        return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, lowest)[None, None]


def gated(output: Tensor, active: Tensor | None, gates: Tensor | None) -> Tensor:
    """Heads' outputs [B, T, H, d] times their gates [B, T, H]; gates None: 1 where a head is active, None: all are."""
    if active is None:
        return output
    return output * (active if gates is None else gates).unsqueeze(-1).to(output.dtype)


def runs(rows: list[int]) -> list[slice]:
    """Ascending rows as slices of neighbours: the kernel divides a slice between threads, and a single row not."""
    known = set(rows)
    begins = [row for row in rows if row - 1 not in known]
    ends = [row + 1 for row in rows if row + 1 not in known]
    return [slice(*run) for run in zip(begins, ends, strict=True)]


class MixtureOfHeadModel:
    """Mixed into the donor's decoder stack: wraps every `self_attn`, and keeps the rotary frequencies in float32."""

    attention_class = MixtureOfHeadAttention

    def __init__(self, config: MixtureOfHeadFields):
        super().__init__(config)  # type: ignore[call-arg]
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = self.attention_class(layer.self_attn, config, layer_idx)
        self.post_init()  # type: ignore[attr-defined]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Cast or move, but not the rotary frequencies: in bfloat16 a phase is wrong after a few hundred tokens."""
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


class MixtureOfHeadForCausalLM:
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def __init__(self, config: MixtureOfHeadFields):
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def head_load(self, seen: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Of the last forward pass in training, for each layer that routes: the mean probability P and the share of
        tokens f of its routed units, both [R]. seen [B, T]: which tokens count, None: all; padding must not.
        """
        kept = slice(None) if seen is None else seen.bool()
        found = []
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, HeadRouter) and module.last is not None:
                probability, share = (x[kept].flatten(0, -2).float().mean(0) for x in module.last)
                found.append((probability, share))
        return found

    def load_balance(self, seen: Tensor | None = None) -> Tensor:
        """Σ P f, the mean of all layers that route (MoH, eq. 7): chosen / R where the load is balanced; to be added to
        the loss, times 0.01 in the paper.
        """
        start: Tensor = torch.zeros((), device=next(self.parameters()).device)  # type: ignore[attr-defined]
        loads = self.head_load(seen)
        return sum(((p * f).sum().to(start.device) for p, f in loads), start) / max(1, len(loads))


def __getattr__(name: str) -> Any:
    """`MoH<Donor>Model` and `MoH<Donor>ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("MoH"), None)
    if not (name.startswith("MoH") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_moh, f"MoH{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": MixtureOfHeadAttention}
        return globals().setdefault(name, type(name, (MixtureOfHeadModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"MoH{stack.__name__}")
    return globals().setdefault(name, type(name, (MixtureOfHeadForCausalLM, donor), body))
