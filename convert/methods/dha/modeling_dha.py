"""Causal language models whose layers cache K heads and V heads of numbers of their own.

Each class is its donor's own transformers class with every `self_attn` replaced, so whatever is not attention
runs the donor's code. This file is shipped inside converted checkpoints: it imports torch, transformers and its
siblings only.

Shapes: B batch, T query tokens, S cached tokens, H query heads, K and V numbers of cached heads, d head_dim,
D hidden_size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # the one that knows softcap
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # the one that knows partial rotation

from . import configuration_dha
from .configuration_dha import DecoupledHeadFields


class HeadLists:
    """Lists of heads, as tensors too.

    Not a module and no buffers: nothing is left uninitialised by `from_pretrained`.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.device], Tensor] = {}

    def index(self, name: str, device: torch.device) -> Tensor:
        """One of the lists as a tensor on `device`."""
        if torch.compiler.is_compiling():
            return torch.tensor(getattr(self, name), device=device)
        if (name, device) not in self.known:
            with torch.inference_mode(False):  # a later pass may have gradients
                self.known[name, device] = torch.tensor(getattr(self, name), device=device)
        return self.known[name, device]


class HeadGroups(HeadLists):
    """Which query heads read which cached head, for products of all heads at once.

    A group that is smaller than the largest is filled up with a head of its own.
    """

    def __init__(self, head_map: list[int]):
        super().__init__()
        members = [[h for h, read in enumerate(head_map) if read == n] for n in range(max(head_map) + 1)]
        self.count, self.size = len(members), max(map(len, members))
        self.spread = [heads[min(i, len(heads) - 1)] for heads in members for i in range(self.size)]
        self.places = [self.spread.index(head) for head in range(len(head_map))]
        self.plain = self.spread == list(range(len(head_map)))  # as grouped-query attention has them
        self.head_map = head_map

    def gather(self, x: Tensor) -> Tensor:
        """[B, H, T, n] -> [B, count, size · T, n]: the rows that meet each cached head."""
        if not self.plain:
            x = x.index_select(1, self.index("spread", x.device))
        return x.unflatten(1, (self.count, self.size)).flatten(2, 3)

    def scatter(self, x: Tensor) -> Tensor:
        """[B, count, size · T, n] -> [B, H, T, n]."""
        x = x.unflatten(2, (self.size, -1)).flatten(1, 2)
        return x if self.plain else x.index_select(1, self.index("places", x.device))

    def expand(self, cached: Tensor) -> Tensor:
        """[B, count, S, d] -> [B, H, S, d]: each query head's own."""
        return cached.index_select(1, self.index("head_map", cached.device))


class StepRuns(HeadLists):
    """What the kernel behind sdpa reads of the cache in a step of one token, nothing of which is copied.

    Query heads that read the same pair of cached heads are rows of one product. A run is of pairs that equally many
    heads read, whose key heads are one or follow each other, and whose value heads are or do: one call of the kernel.
    """

    def __init__(self, keys: HeadGroups, values: HeadGroups):
        super().__init__()
        pairs = list(zip(keys.head_map, values.head_map, strict=True))
        members = {pair: [h for h, read in enumerate(pairs) if read == pair] for pair in sorted(set(pairs))}
        self.order = [head for heads in members.values() for head in heads]
        self.places = [self.order.index(head) for head in range(len(pairs))]
        self.plain = self.order == list(range(len(pairs)))
        runs: list[list[tuple[int, int]]] = []
        for pair, heads in members.items():
            longer = [*runs[-1], pair] if runs else [pair]
            alike = len(members[longer[0]]) == len(heads)
            if alike and all(neighbours(side) for side in zip(*longer, strict=True)):
                runs[-1:] = [longer]
            else:
                runs.append([pair])
        self.pairs = [len(run) for run in runs]
        self.queries = [len(run) * len(members[run[0]]) for run in runs]
        self.spans = [[slice(side[0], side[-1] + 1) for side in zip(*run, strict=True)] for run in runs]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """query [B, H, 1, d], key [B, K, S, d], value [B, V, S, d], mask [B, 1, 1, S] -> output [B, 1, H d]."""
        if not self.plain:
            query = query.index_select(1, self.index("order", query.device))
        found: list[Tensor] = []
        parts = query.split_with_sizes(self.queries, dim=1)
        for rows, count, spans in zip(parts, self.pairs, self.spans, strict=True):
            read, mixed = (
                x[:, span].expand(-1, count, -1, -1) for x, span in zip((key, value), spans, strict=True)
            )
            grouped = rows.reshape(len(rows), count, -1, rows.shape[-1])
            outputs = F.scaled_dot_product_attention(grouped, read, mixed, mask, scale=scaling)
            found.append(outputs.reshape(rows.shape))
        whole = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        if not self.plain:
            whole = whole.index_select(1, self.index("places", whole.device))
        return whole.flatten(1).unsqueeze(1)


class DecoupledHeadAttention(nn.Module):
    """Attention whose query heads read K heads and V heads by two maps (DHA, arXiv 2406.06567, section 3).

    The cache holds K keys and V values a token, and nothing else. Cache classes want one number of heads for both,
    so where K and V differ, the heads lie beside each other in c = gcd(K, V) wider ones. A few query tokens meet the
    cached heads as they are; more of them copy each head for its readers, as kernels want it.

    A donor with QK-norm lends its norms: its K heads are all there, in their order, and only V heads are fused.
    """

    is_causal = True
    max_grouped_tokens = 32

    def __init__(self, config: Any, layer_idx: int, norms: tuple[nn.Module, nn.Module] | None = None):
        """norms: the donor's of queries and keys, where config.qk_norm says that it has them."""
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.qk_norm = config.qk_norm
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        k_map, v_map = config.head_maps(layer_idx)
        self.keys, self.values = HeadGroups(k_map), HeadGroups(v_map)
        self.stock = k_map == v_map and self.keys.plain  # grouped-query attention
        self.num_key_value_groups = self.keys.size if self.stock else 1
        self.cached_heads = math.gcd(self.keys.count, self.values.count)
        # Where cached heads are views of the wider ones that they lie in.
        views = self.cached_heads == 1 or self.cached_heads == self.keys.count == self.values.count
        self.step = StepRuns(self.keys, self.values) if views and config.attention_softcap is None else None
        self.scaling = config.softmax_scale or self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.layer_window(layer_idx)
        self.attention_dropout = config.attention_dropout
        width, biased = config.hidden_size, config.attention_input_bias
        query_width = len(k_map) * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=biased)
        self.k_proj = nn.Linear(width, self.keys.count * self.head_dim, bias=biased)
        self.v_proj = nn.Linear(width, self.values.count * self.head_dim, bias=biased)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, d] -> output [B, T, D], weights."""
        batch, length, _ = hidden_states.shape
        heads = (batch, length, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm == "width":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads), key.view(heads)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            cached = (beside(key, self.cached_heads), beside(value, self.cached_heads))
            key, value = past_key_values.update(*cached, self.layer_idx)
        else:
            key, value = beside(key, self.cached_heads), beside(value, self.cached_heads)

        if not self.stock and past_key_values is not None and self.can_group(length, attention_mask):
            output, weights = self.grouped_attention(query, key, value, attention_mask)
            return self.o_proj(output), weights

        if not self.stock:
            key, value = (
                self.keys.expand(apart(key, self.head_dim)),
                self.values.expand(apart(value, self.head_dim)),
            )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_mask is None:
            attention_mask = self.own_mask(hidden_states, key.shape[2])
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """query [B, T, H, d], key [B, T, K, d] -> [B, H, T, d], [B, K, T, d]."""
        if cos.shape[-1] < self.head_dim:
            return apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        both = torch.cat((query, key), dim=2).transpose(1, 2)
        query, key = turned(both, cos, sin).split_with_sizes([query.shape[2], key.shape[2]], dim=1)
        return query, key

    def can_group(self, length: int, attention_mask: Any) -> bool:
        """Whether `grouped_attention` can read the mask ([B, 1, T, S]; none for one token). Kernels do dropout."""
        if length > self.max_grouped_tokens or (self.training and self.attention_dropout):
            return False
        if attention_mask is None:
            return length == 1  # more without a mask: the kernel knows which of them are causal
        return isinstance(attention_mask, Tensor) and attention_mask.dim() == 4

    def grouped_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a few query tokens on the cached heads, none of which is copied.

        query [B, H, T, d]; key [B, c, S, K / c · d], value [B, c, S, V / c · d]
        -> output [B, T, H d], weights [B, H, T, S] or, of a step with sdpa, None.
        """
        if self.step is not None and query.shape[2] == 1 and self.config._attn_implementation == "sdpa":
            mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
            heads = apart(key, self.head_dim), apart(value, self.head_dim)
            return self.step.attend(query, *heads, mask, self.scaling), None
        scores = self.keys.scatter(products(self.keys.gather(query * self.scaling), key, self.head_dim, True))
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if attention_mask is not None:
            mask = attention_mask[..., : scores.shape[-1]]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        output = self.values.scatter(products(self.values.gather(weights), value, self.head_dim, False))
        return output.transpose(1, 2).flatten(2), weights

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


def neighbours(heads: tuple[int, ...]) -> bool:
    """Whether they are one head, or follow each other."""
    return len(set(heads)) == 1 or heads == tuple(range(heads[0], heads[0] + len(heads)))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of whole heads: x [B, n, T, d], cos and sin [B, T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(1)


def beside(x: Tensor, wide: int) -> Tensor:
    """[B, n, S, d] -> [B, wide, S, n / wide · d]: heads that follow each other in one row."""
    if x.shape[1] == wide:
        return x
    return x.view(len(x), wide, x.shape[1] // wide, *x.shape[2:]).transpose(2, 3).flatten(3)


def apart(x: Tensor, head_dim: int) -> Tensor:
    """[B, wide, S, m · d] -> [B, wide · m, S, d]."""
    if x.shape[-1] == head_dim:
        return x
    return x.view(*x.shape[:3], x.shape[-1] // head_dim, head_dim).transpose(2, 3).flatten(1, 2)


def products(rows: Tensor, cached: Tensor, head_dim: int, transposed: bool) -> Tensor:
    """rows [B, n, R, d or S] times each of n heads in `cached` [B, wide, S, n / wide · d], transposed or not.

    One product for each head of a wide one, on views: bmm reads rows that lie further apart than they are long.
    """
    batch, wide = cached.shape[:2]
    parts = cached.flatten(0, 1).split(head_dim, dim=-1)
    queries = rows.unflatten(1, (wide, -1)).unbind(2)
    found = [
        torch.bmm(q.flatten(0, 1), part.mT if transposed else part)
        for q, part in zip(queries, parts, strict=True)
    ]
    return torch.stack(found, dim=1).unflatten(0, (batch, wide)).flatten(1, 2)


class DecoupledHeadModel:
    """Mixed into the donor's decoder stack: replaces every `self_attn`, and keeps the rotary frequencies in float32."""

    def __init__(self, config: DecoupledHeadFields):
        super().__init__(config)  # type: ignore[call-arg]
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            own = layer.self_attn
            norms = (own.q_norm, own.k_norm) if config.qk_norm else None
            layer.self_attn = DecoupledHeadAttention(config, layer_idx, norms)
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


class DecoupledHeadForCausalLM:
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def __init__(self, config: DecoupledHeadFields):
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.decoder_class(config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """`DHA<Donor>Model` and `DHA<Donor>ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("DHA"), None)
    if not (name.startswith("DHA") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_dha, f"DHA{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": DecoupledHeadAttention}
        return globals().setdefault(name, type(name, (DecoupledHeadModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"DHA{stack.__name__}")
    return globals().setdefault(name, type(name, (DecoupledHeadForCausalLM, donor), body))
