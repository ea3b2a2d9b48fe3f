"""Causal language models that cache the code of one latent per token, one row of bytes for all heads of a layer.

Each class is its donor's own transformers class with every `self_attn` replaced. This file is shipped inside converted
checkpoints: it imports torch, transformers and its siblings only.

Shapes: B batch, T query tokens, S cached tokens, H query heads, G KV heads, d head_dim, n components, R bytes of a row,
D hidden_size.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # the one that knows softcap
from transformers.models.llama.modeling_llama import rotate_half

from . import configuration_coded_mla
from .configuration_coded_mla import CodedLatentFields
from .first_tokens import place_windows
from .latent_code import LatentCode
from .modeling_coded_window import attend_in_window
from .modeling_mla import LatentAttention, LatentAttentionForCausalLM, LatentAttentionModel
from .slot_embeddings import SlotEmbeddings

# Rows of the cache that are decoded at a time while a few tokens are generated: what fits in a CPU's cache.
BLOCK_ROWS = 4096
CUDA_BLOCK_ROWS = 65536  # there each operation should be large


class ElementNorm(nn.Module):
    """A donor's norm of its queries or keys: each of `groups` parts is divided by its RMS; a gain for each element."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]."""
        parts = x.float().unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2).to(x.dtype) * self.weight


class CodedLatentAttention(LatentAttention):
    """Grouped-query attention whose keys (before RoPE) and values are read from the code of one joint latent.

    kv_a_proj_with_mqa takes a hidden state to the latent, whitened components; `code` makes a row of bytes of it, which
    a cache holds as its keys; kv_b_proj takes the decoded latent to the keys and values of the KV heads. Without a
    cache the same codes are made and read, so that what is evaluated is what is served.

    The keys of a donor with QK-norm are not linear in the hidden state. There k_proj, v_proj and k_norm are the
    donor's, and kv_a_proj_with_mqa reads the normed keys and the values.

    Inherited: `own_mask`, `slots`, `cache_embeddings`, `can_absorb`, `capped_and_masked`.
    """

    def __init__(self, config: Any, layer_idx: int):
        nn.Module.__init__(self)
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.scaling = config.softmax_scale or self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window, self.kv_window = config.layer_window(layer_idx), config.kv_window(layer_idx)
        self.attention_dropout = config.attention_dropout
        self.slot_embeddings: SlotEmbeddings | None = None
        self.code = LatentCode(config.layer_counts(layer_idx))
        rank, width = len(self.code.sink), config.hidden_size
        kv_width = self.num_key_value_heads * self.head_dim
        q_width, biased, norm = self.num_heads * self.head_dim, config.attention_input_bias, config.qk_norm
        self.q_proj = nn.Linear(width, q_width, bias=biased)
        if norm is not None:
            groups = (self.num_heads, self.num_key_value_heads) if norm == "head" else (1, 1)
            self.q_norm = ElementNorm(q_width, groups[0], config.rms_norm_eps)
            self.k_norm = ElementNorm(kv_width, groups[1], config.rms_norm_eps)
            self.k_proj = nn.Linear(width, kv_width, bias=biased)
            self.v_proj = nn.Linear(width, kv_width, bias=biased)
        self.kv_a_proj_with_mqa = nn.Linear(width if norm is None else 2 * kv_width, rank, bias=True)
        self.kv_b_proj = nn.Linear(rank + 1, 2 * kv_width, bias=True)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D]; position_embeddings (cos, sin) [B, T, rotary width] -> output [B, T, D], weights."""
        batch, length, _ = hidden_states.shape
        query, written = self.queries_and_latent(hidden_states)
        rows = self.code.encode(written).unsqueeze(1)
        if self.kv_window is not None:
            seen = (position_embeddings, attention_mask, past_key_values)
            return self.o_proj(
                attend_in_window(self, query, written, rows, *seen, rotate_half_split, kwargs)
            ), None
        of_queries = of_keys = position_embeddings
        if past_key_values is not None:
            cached: list[Any] = past_key_values.layers[self.layer_idx : self.layer_idx + 1]
            self._require_rows(*(layer.keys for layer in cached if layer.is_initialized))
            rows, _ = past_key_values.update(rows, rows[..., :0], self.layer_idx)
            self._require_rows(rows)
            if rows.shape[2] != length:
                tables = self.slots()(rows.shape[2], hidden_states)
                of_queries, of_keys = self.cache_embeddings(length, tables, past_key_values, attention_mask)
        query = rotate_half_split(query, *of_queries)
        if attention_mask is None:
            attention_mask = self.own_mask(hidden_states, rows.shape[2])
        learns = written.requires_grad  # blocks have no straight-through gradient
        in_blocks = past_key_values is not None and not learns and not kwargs.get("output_attentions")
        if in_blocks and self._few(length, attention_mask):
            return self.o_proj(self.read_in_blocks(query, rows, of_keys, attention_mask)), None
        latent = self.code.decode(rows, query.dtype).mT.unflatten(0, (batch, -1))
        if learns and latent.shape[1] == length:
            # Straight-through: rounding has slope one.
            latent = latent + F.pad(written - written.detach(), (0, 1))
        key, value = self.keys_and_values(latent)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        output, weights = attention(
            self,
            query,
            rotate_half_split(key, *of_keys),
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _require_rows(self, *caches: Tensor) -> None:
        """Raise ValueError for a cache of another model, and for a kind of cache that changes what it holds."""
        for rows in caches:
            if rows.dtype != torch.uint8 or (rows.numel() and rows.shape[-1] != self.code.bytes):
                raise ValueError(
                    f"layer {self.layer_idx} caches rows of {self.code.bytes} bytes (uint8), and this cache holds "
                    f"{rows.shape[-1]} elements of {rows.dtype} a token: it is another model's, or of a kind that "
                    "changes what it holds, such as QuantizedCache"
                )

    def queries_and_latent(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [B, T, D] -> queries before RoPE [B, H, T, d], the latent to be coded [B, T, n]."""
        query, written = self.q_proj(hidden_states), hidden_states
        if self.config.qk_norm is not None:
            query, key = self.q_norm(query), self.k_norm(self.k_proj(hidden_states))
            written = torch.cat((key, self.v_proj(hidden_states)), dim=-1)
        return query.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), self.kv_a_proj_with_mqa(written)

    def keys_and_values(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded latent [B, S, n + 1] -> keys before RoPE and values, [B, G, S, d] each."""
        heads = self.kv_b_proj(latent).unflatten(-1, (2 * self.num_key_value_heads, self.head_dim))
        return heads.transpose(1, 2).chunk(2, dim=1)  # type: ignore[return-value]

    def _few(self, length: int, attention_mask: Any) -> bool:
        """Whether there are few query tokens, with a mask and weights that blocks can read."""
        return (
            length <= self.max_absorbed_tokens
            and not self.training
            and self.can_absorb(length, attention_mask)
        )

    def read_in_blocks(
        self, query: Tensor, rows: Tensor, of_keys: tuple[Tensor, Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        """Attention of a few tokens that decodes a block of rows at a time, with a running softmax over several.

        Values stay latents until the end: their projection is linear, so it follows the sum over tokens.

        Args:
            query: [B, H, T, d] with RoPE; rows [B, 1, S, R]; of_keys: cos, sin [1 or B, S, rotary width].
        Returns:
            [B, T, H d].
        """
        batch, heads, length, _ = query.shape
        kv_heads = self.num_key_value_heads
        mean = self.latent_mean(query, rows, of_keys, attention_mask).to(query.dtype)
        v_up, v_mean = self.kv_b_proj.weight.chunk(2)[1], self.kv_b_proj.bias.chunk(2)[1]
        mean = mean.view(batch, kv_heads, -1, mean.shape[-1])
        output = mean @ v_up.view(kv_heads, self.head_dim, -1).mT + v_mean.view(kv_heads, 1, -1)
        return output.view(batch, heads, length, -1).transpose(1, 2).flatten(2)

    def latent_mean(
        self, query: Tensor, rows: Tensor, of_keys: tuple[Tensor, Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        """The decoded latents, weighted for each query: [B, H, T, n + 1], fp32. Arguments as of `read_in_blocks`."""
        asked = not torch.compiler.is_compiling() and os.environ.get("MHCONVERT_TRITON") == "1"
        if asked and find_spec("triton") is not None:
            from .coded_kernel import can_read, latent_mean  # of triton, which a checkpoint does without

            if can_read(query, of_keys, self.kv_b_proj):
                return latent_mean(self, query, rows, of_keys, attention_mask)
        threads = 1 if query.is_cuda or torch.compiler.is_compiling() else torch.get_num_threads()
        step = CUDA_BLOCK_ROWS if query.is_cuda else BLOCK_ROWS
        seen, together = rows.shape[2], max(1, step // rows.shape[2])
        groups = [slice(begin, begin + together) for begin in range(0, len(query), together)]
        # A sequence that is alone is read in parts, so that every thread has one.
        part = -(-seen // min(-(-threads // len(groups)), -(-seen // step)))
        keys = RebuiltKeys(self, query, of_keys)
        shared = attention_mask is None or len(attention_mask) == 1

        def mask_of(own: slice) -> Tensor | None:
            return attention_mask if shared else attention_mask[own]  # type: ignore[index]

        def read(own: slice, begin: int) -> tuple[Tensor, Tensor, Tensor]:
            tokens = range(begin, min(begin + part, seen))
            return self._part_of(keys, own, rows[own, 0], tokens, step // together, mask_of(own))

        def read_at_once(own: slice, _: int) -> Tensor:
            latent = self.code.decode(rows[own, 0], query.dtype)
            weights = self._scores(keys, latent, own, slice(0, seen), mask_of(own)).softmax(-1)
            return weighted(weights, latent)

        begins = range(0, seen, part)
        work = [(own, begin) for own in groups for begin in begins]
        if seen <= step // together:
            return torch.cat(on_threads(read_at_once, work, threads))
        found = on_threads(read, work, threads)
        return torch.cat([joined(found[i : i + len(begins)]) for i in range(0, len(found), len(begins))])

    def _part_of(
        self, keys: "RebuiltKeys", own: slice, rows: Tensor, tokens: range, step: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded latents of `tokens` of the sequences `own`, summed with weights exp(score - peak), `step` at a time.

        Args:
            rows: [b, S, R] of these sequences; mask: [1 or b, 1 or H, T, S].
        Returns:
            The sum [b, H, T, n + 1], the peak of scores and the total of weights [b, H, T, 1], fp32.
        """
        query = keys.query[own]
        batch, heads = len(query), self.num_heads
        peak = query.new_full((batch, heads, query.shape[1] // heads, 1), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(peak)
        latent_sum = peak.new_zeros(*peak.shape[:-1], self.kv_b_proj.in_features)
        for start in range(tokens.start, tokens.stop, step):
            block = slice(start, min(start + step, tokens.stop))
            latent = self.code.decode(rows[:, block], query.dtype)  # n+1, b t
            scores = self._scores(keys, latent, own, block, mask)
            # Finite, so that a block in which nothing is visible adds nothing, even with masks of -inf.
            highest = torch.maximum(peak, scores.amax(-1, keepdim=True))
            highest = highest.clamp_min(torch.finfo(peak.dtype).min)
            weights, kept = (scores - highest).exp(), (peak - highest).exp()
            latent_sum = latent_sum * kept + weighted(weights, latent)
            total, peak = total * kept + weights.sum(-1, keepdim=True), highest
        return latent_sum, peak, total

    def _scores(
        self, keys: "RebuiltKeys", latent: Tensor, own: slice, block: slice, mask: Tensor | None
    ) -> Tensor:
        """[b, H, T, t], fp32, of the decoded tokens `block` of the sequences `own`; arguments as of `_part_of`."""
        scores = keys.scores(latent, own, block)
        scores = scores.view(len(scores), self.num_heads, -1, scores.shape[-1]).float()
        return self.capped_and_masked(scores, None if mask is None else mask[..., block], latent.dtype)


class RebuiltKeys:
    """Scores of decoded latents, by the keys of all KV heads. Queries are as wide: zero outside of their own head."""

    def __init__(self, layer: CodedLatentAttention, query: Tensor, of_keys: tuple[Tensor, Tensor]):
        """query: [B, H, T, d] with RoPE; of_keys: cos, sin [1 or B, S, w]."""
        self.heads, self.half = layer.num_key_value_heads, of_keys[0].shape[-1] // 2
        grouped = (query * layer.scaling).reshape(len(query), self.heads, -1, layer.head_dim)
        wide = grouped.new_zeros(*grouped.shape[:3], self.heads, layer.head_dim)
        wide.diagonal(dim1=1, dim2=3).copy_(grouped.permute(0, 2, 3, 1))
        self.query = wide.flatten(3).flatten(1, 2)  # B, H T, G d
        width = self.query.shape[-1]
        self.up, self.mean = layer.kv_b_proj.weight[:width], layer.kv_b_proj.bias[:width].unsqueeze(-1)
        by_component = [each[..., : self.half].permute(2, 0, 1) for each in of_keys]
        self.cos_sin = [each if each.stride(-1) == 1 else each.contiguous() for each in by_component]

    def scores(self, latent: Tensor, own: slice, block: slice) -> Tensor:
        """[b, H T, t] of the latents [n + 1, b t] of the tokens `block` of the sequences `own`."""
        query = self.query[own]
        key = torch.addmm(self.mean, self.up, latent).view(
            self.heads, -1, len(query), latent.shape[1] // len(query)
        )
        first, second = key[:, : self.half], key[:, self.half : 2 * self.half]
        cos, sin = ((each if each.shape[1] == 1 else each[:, own])[..., block] for each in self.cos_sin)
        across = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(across)
        return product(query, key.flatten(0, 1).transpose(0, 1))


def weighted(weights: Tensor, latent: Tensor) -> Tensor:
    """Sums of latents [n + 1, b t] with weights [b, H, T, t]: [b, H, T, n + 1], fp32."""
    by_sequence = latent.unflatten(1, (len(weights), -1)).permute(1, 2, 0)  # b t n+1
    return product(weights.flatten(1, 2).to(latent.dtype), by_sequence).view(*weights.shape[:3], -1).float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [b, i, k] @ b [b, k, j]; of one matrix as such, which is faster on a CPU than a batch of one."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else a @ b


def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The weighted mean, of the sums, peaks and totals of its parts as `_part_of` gives them."""
    sums, peaks, totals = (torch.stack(each) for each in zip(*parts, strict=True))
    share = (peaks - peaks.amax(0)).exp()
    return (sums * share).sum(0) / (totals * share).sum(0)


def on_threads(work: Callable, items: list[tuple], threads: int) -> list:
    """[work(*item) for item in items], on up to `threads` threads, without gradients.

    Each thread computes alone, as torch gains little where it divides operations as small as these.
    """
    if threads == 1 or len(items) == 1 or torch.is_autocast_enabled("cpu"):
        return [work(*item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def alone(item: tuple) -> Any:
        with torch.inference_mode(inference), torch.no_grad():
            return work(*item)

    return list(thread_pool(threads, os.getpid()).map(alone, items))


@lru_cache(1)
def thread_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process, a fork having none, in which torch does not divide operations."""
    all_there = Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # gives this thread its number; later that would undo the next line
        torch.set_num_threads(1)
        all_there.wait()

    pool = ThreadPoolExecutor(threads)
    begun = [pool.submit(begin) for _ in range(threads)]
    all_there.wait()
    torch.set_num_threads(threads)  # what new threads of the program begin with was changed too
    for each in begun:
        each.result()
    return pool


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in its half-split layout: x [B, heads, T, d]; cos, sin [B or 1, T, w]; elements from w on are left alone."""
    cos, sin, width = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    turned = turned * cos + rotate_half(turned) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class CodedLatentAttentionModel(LatentAttentionModel):
    """Mixed into the donor's decoder stack: replaces every `self_attn`."""

    def __init__(self, config: CodedLatentFields):
        super(LatentAttentionModel, self).__init__(config)  # type: ignore[call-arg]
        kinds: Any = getattr(config, "layer_types", None) or [None] * len(self.layers)  # type: ignore[attr-defined]
        slots = {kind: SlotEmbeddings(self.rotary_emb, kind) for kind in set(kinds)}  # type: ignore[attr-defined]
        for layer_idx, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = CodedLatentAttention(config, layer_idx)
            layer.self_attn.slot_embeddings = slots[kinds[layer_idx]]
        self.post_init()  # type: ignore[attr-defined]


class CodedLatentAttentionForCausalLM(LatentAttentionForCausalLM):
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> bool:
        made: bool = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if (cache := model_kwargs.get("past_key_values")) is not None:
            place_windows(cache, self.config.kv_windows or [], generation_config.is_assistant)  # type: ignore[attr-defined]
        return made


def __getattr__(name: str) -> Any:
    """`CodedMLA<Donor>Model` and `…ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("CodedMLA"), None)
    if not (name.startswith("CodedMLA") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_coded_mla, f"CodedMLA{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": CodedLatentAttention}
        return globals().setdefault(name, type(name, (CodedLatentAttentionModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"CodedMLA{stack.__name__}")
    return globals().setdefault(name, type(name, (CodedLatentAttentionForCausalLM, donor), body))
