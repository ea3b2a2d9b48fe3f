"""Decoding from coded latents in one Triton kernel: rows of bytes in, the mean latent of each query out. Experimental.

What `CodedLatentAttention.latent_mean` computes with torch, block by block. A program reads the rows of a part of the
cache, tile by tile. It decodes a tile in chunks of components, once for the keys and again for the weighted sum, as
that costs less than room for whole latents; neither these nor keys are written to memory. This file is shipped inside
converted checkpoints: it imports torch, triton and its siblings only, and is imported only where it is asked for.

Shapes: B batch, T query tokens, S cached tokens, H query heads, G KV heads, d head_dim, n components, R bytes of a row,
w rotary width. A pair is two elements of a head that RoPE turns together, or two of the rest. N programs divide the KV
heads; each reads C columns of pairs, M queries (heads and tokens of its KV heads), all n + 1 components padded to P.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from .latent_code import GAIN_STEPS, LEAST_GAIN, NOT_FINITE, SINK, LatentCode, level_offset

try:  # in here transformers does not ask for it before it loads a checkpoint from the Hub
    import triton
    import triton.language as tl
except ImportError:
    raise

TILE, CHUNK = 64, 32  # tokens and components that a program decodes at once; half the tokens in fp32
COLUMNS = 128  # of pairs, at most: two accumulators of TILE x COLUMNS
QUERIES = 64  # rows of scores that a program has at most; 16 in fp32
SLOTS = tl.constexpr(3)  # fields of a component; 7 bits are 4 + 2 + 1
LOWEST = tl.constexpr(-3.4028234663852886e38)
SIZES = ["seen", "part", "row_batch", "row_token", "mask_batch", "mask_head", "mask_query", "turn_batch"]


@triton.jit
def _latent(rows, inside, gain, tables, levels, begin, n, P: tl.constexpr, CHUNK: tl.constexpr):
    """Components begin … begin + CHUNK of a tile [TILE, CHUNK], fp32, as exact as `levels` and `gain` are."""
    component = begin + tl.arange(0, CHUNK)
    code = tl.zeros([rows.shape[0], CHUNK], tl.int32)
    for slot in tl.static_range(SLOTS):
        field = tl.load(tables + slot * P + component)[None, :]
        bits = field >> 22
        byte = tl.load(rows[:, None] + (field & 0xFFFF), mask=inside[:, None] & (bits != 0), other=0)
        code += ((byte.to(tl.int32) >> ((field >> 16) & 7)) & bits) << ((field >> 19) & 7)
    base = tl.load(tables + SLOTS * P + component)[None, :]
    level = tl.load(levels + base + code).to(gain.dtype).to(tl.float32)
    # Component n is the sink's flag; there are none behind it.
    return tl.where(component[None, :] < n, level * gain.to(tl.float32)[:, None], code.to(tl.float32))


@triton.jit
def _product(a, b, so_far, EXACT: tl.constexpr):
    """so_far + a b. Triton's interpreter takes bf16 for integers here, so it has EXACT: the same operands as fp32."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, so_far, input_precision="ieee")


@triton.jit
def _turned(first, second, cos, sin, inside, turn_pair, half, PAIRS: tl.constexpr):
    """RoPE of keys [TILE, C], but for pairs from `half` on. cos, sin: pointers to a token's first angle [TILE]."""
    pair = tl.arange(0, first.shape[1]) % PAIRS
    turns = inside[:, None] & (pair < half)[None, :]
    angle = pair[None, :].to(tl.int64) * turn_pair
    c = tl.load(cos[:, None] + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin[:, None] + angle, mask=turns, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def _seen_scores(
    scores, mask, token, inside, SOFTCAP: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr
):
    """Scores [M, TILE] with softcap and mask: `mask` points to the rows' masks [M, 1]; MASK is none, bool or added."""
    if SOFTCAP > 0:
        scores = (2 * tl.sigmoid(2 / SOFTCAP * scores) - 1) * SOFTCAP  # tanh
    if MASK != "none":
        found = tl.load(mask + token[None, :], mask=inside[None, :], other=0)
        if MASK == "bool":
            scores = tl.where(found != 0, scores, HIDDEN)
        else:
            scores += found.to(tl.float32)
    return tl.where(inside[None, :], scores, float("-inf"))


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def _partial_means(
    query, rows, k_up, k_mean, cos, sin, mask, tables, gains, levels, sums, peaks, totals,
    seen, part, row_batch, row_token, mask_batch, mask_head, mask_query, turn_batch, turn_token,
    turn_pair, n, queries, tokens, heads_queries, half, programs,
    P: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr, EXACT: tl.constexpr,
):
    """One part of the cache for M queries: the sum of latents [M, P] weighted by exp(score - peak), peaks, totals."""
    # fmt: on
    group, batch = tl.program_id(0) // programs, tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty
    m, column = tl.program_id(0) % programs * M + tl.arange(0, M), tl.arange(0, C)
    line = (batch * (tl.num_programs(0) // programs) + group) * queries + m
    # Rows of other heads than a column's are zero, so one product gives the scores of all heads.
    own = (m < queries)[:, None] & (m[:, None] // heads_queries == column[None, :] // PAIRS)
    at = query + line[:, None] * (2 * PAIRS) + (column % PAIRS)[None, :]
    q_first, q_second = tl.load(at, mask=own, other=0.0), tl.load(at + PAIRS, mask=own, other=0.0)
    head, k_up, k_mean = (group * queries + m) // tokens, k_up + group * 2 * P * C, k_mean + group * 2 * C
    mask += batch * mask_batch + (tl.where(m < queries, head, 0) * mask_head + m % tokens * mask_query)[:, None]
    place = (batch * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    cell = sums + (place * M + tl.arange(0, M))[:, None] * P + tl.arange(0, CHUNK)[None, :]
    begin = tl.program_id(1) * part
    for start in range(begin, tl.minimum(begin + part, seen), TILE):
        token = start + tl.arange(0, TILE)
        inside, row = token < seen, rows + batch * row_batch + token.to(tl.int64) * row_token
        gain = tl.load(gains + (tl.load(row, mask=inside, other=0).to(tl.int32) & 127))
        first = tl.zeros([TILE, C], tl.float32) + tl.load(k_mean + column).to(tl.float32)[None, :]
        second = tl.zeros([TILE, C], tl.float32) + tl.load(k_mean + C + column).to(tl.float32)[None, :]
        for chunk in range(0, P, CHUNK):
            latent = _latent(row, inside, gain, tables, levels, chunk, n, P, CHUNK).to(dtype)
            up = k_up + (chunk + tl.arange(0, CHUNK))[:, None] * (2 * C) + column[None, :]
            first = _product(latent, tl.load(up), first, EXACT)
            second = _product(latent, tl.load(up + C), second, EXACT)
        turn = batch * turn_batch + token * turn_token
        first, second = _turned(first, second, cos + turn, sin + turn, inside, turn_pair, half, PAIRS)
        scores = _product(q_first, tl.trans(first.to(dtype)), tl.zeros([M, TILE], tl.float32), EXACT)
        scores = _product(q_second, tl.trans(second.to(dtype)), scores, EXACT)
        scores = _seen_scores(scores, mask, token, inside, SOFTCAP, MASK, HIDDEN)
        highest = tl.maximum(tl.maximum(peak, tl.max(scores, 1)), LOWEST)  # finite, though all of a tile be hidden
        weights, kept = tl.exp(scores - highest[:, None]), tl.exp(peak - highest)
        total, peak = total * kept + tl.sum(weights, 1), highest
        for chunk in range(0, P, CHUNK):
            latent = _latent(row, inside, gain, tables, levels, chunk, n, P, CHUNK).to(dtype)
            before = tl.load(cell + chunk, mask=(start + 0 * m)[:, None] > begin, other=0.0)
            tl.store(cell + chunk, _product(weights.to(dtype), latent, before * kept[:, None], EXACT))
        tl.debug_barrier()  # the next tile reads what this one wrote
    tl.store(peaks + place * M + tl.arange(0, M), peak)
    tl.store(totals + place * M + tl.arange(0, M), total)


def can_read(query: Tensor, of_keys: tuple[Tensor, Tensor], kv_b_proj: nn.Linear) -> bool:
    """Whether the kernel reads these shapes and dtypes, on this device, without a gradient."""
    width, head_dim = of_keys[0].shape[-1], query.shape[-1]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *kv_b_proj.parameters()))
    runs = query.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = head_dim % 2 == width % 2 == 0 and width <= head_dim <= 2 * COLUMNS
    known = query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return runs and fits and known and kv_b_proj.weight.dtype == query.dtype and not learns


def field_table(code: LatentCode) -> Tensor:
    """Where each of n components and the sink's flag lies in a row of `code`, a LatentCode: (SLOTS + 1, P), int32.

    A slot is a field: its byte, how far it is shifted right and then left, its bits; 0 where a component has fewer. The
    last row says where the component's levels begin.
    """
    n, begin = len(code.sink), 1
    padded = -(-(n + 1) // CHUNK) * CHUNK
    table, used = [[0] * padded for _ in range(SLOTS.value + 1)], [0] * n
    for field, size, users in code.fields:
        places = ((width, i) for width, start, stop in users for i in range(start, stop))
        for at, (width, i) in enumerate(places):
            byte, right, left = begin + at % size, at // size * field, width % field
            table[used[i]][i] = byte | right << 16 | left << 19 | (2**field - 1) << 22
            used[i] += 1
        begin += size
    for width, start, stop in code.ranges:
        table[-1][start:stop] = [level_offset(width)] * (stop - start)
    table[0][n] = 7 << 16 | 1 << 22
    return torch.tensor(table, dtype=torch.int32)


def tables(code: LatentCode, like: Tensor) -> tuple[Tensor, Tensor]:
    """`field_table` and the 128 gains, kept in `code` for the device and dtype of `like`, outside its state dict."""
    kept, key = code.__dict__.setdefault("kernel_tables", {}), (like.device, like.dtype)
    if key not in kept:
        gains = torch.exp2(torch.arange(SINK) / GAIN_STEPS + LEAST_GAIN)
        gains[NOT_FINITE] = torch.nan
        kept[key] = field_table(code).to(like.device), gains.to(like.device, like.dtype)
    return kept[key]


def pair_order(head_dim: int, width: int, device: torch.device) -> Tensor:
    """(2, d / 2): the elements of a head by pairs; those that turn first, the rest behind them in their own pairs."""
    order = torch.arange(head_dim, device=device)
    return torch.cat((order[:width].view(2, -1), order[width:].view(2, -1)), dim=1)


def packed_keys(kv_b_proj: nn.Linear, order: Tensor, groups: int, heads: int, padded: int, columns: int) -> Any:
    """Rows of kv_b_proj that make keys, by pairs: weight (N, P, 2, C), bias (N, 2, C). Anew, as weights may change."""
    pairs, width = order.shape[1], kv_b_proj.in_features
    starts = torch.arange(groups * heads, device=order.device) * 2 * pairs
    rows = (starts.view(groups, 1, heads, 1) + order.view(1, 2, 1, pairs)).flatten()
    shape = (groups, 2, heads * pairs)
    weight = kv_b_proj.weight.new_zeros(groups, padded, 2, columns)
    weight[:, :width, :, : shape[2]] = kv_b_proj.weight[rows].view(*shape, width).permute(0, 3, 1, 2)
    bias = nn.functional.pad(kv_b_proj.bias[rows].view(shape), (0, columns - shape[2]))
    return weight, bias


def processors(like: Tensor) -> int:
    """How many programs the device runs at once; a few where Triton interprets, so that parts are joined there too."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 16


def latent_mean(
    layer: Any, query: Tensor, rows: Tensor, of_keys: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """The weighted mean of the decoded latents for each query.

    Args:
        layer: a CodedLatentAttention.
        query: [B, H, T, d] with RoPE; rows [B, 1, S, R]; of_keys: cos, sin [1 or B, S, w], of which the first
            half is read, as the second is the same; mask: [B, 1 or H, T, S], boolean or added.
    Returns:
        [B, H, T, n + 1], fp32.
    """
    (batch, heads, length, head_dim), seen = query.shape, rows.shape[2]
    code, kv_heads, pairs = layer.code, layer.num_key_value_heads, head_dim // 2
    each = max(k for k in range(1, kv_heads + 1) if k == 1 or (kv_heads % k == 0 and k * pairs <= COLUMNS))
    groups, columns = kv_heads // each, max(16, triton.next_power_of_2(each * pairs))
    queries = heads // groups * length
    most, tile = (16, TILE // 2) if query.dtype == torch.float32 else (QUERIES, TILE)
    m = min(most, max(16, triton.next_power_of_2(queries)))
    programs, (table, gains) = -(-queries // m), tables(code, query)
    order = pair_order(head_dim, of_keys[0].shape[-1], query.device)
    k_up, k_mean = packed_keys(layer.kv_b_proj, order, groups, each, table.shape[1], columns)
    cos, sin = (e.expand(batch, -1, -1) for e in of_keys)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    kind, mask_strides, masks = "none", [0, 0, 0], query
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "added"
        masks = mask if mask.stride(-1) == 1 else mask.contiguous()
        masks = (masks.view(torch.uint8) if kind == "bool" else masks).expand(batch, heads, length, -1)
        mask_strides = list(masks.stride()[:3])
    tiles = -(-seen // tile)
    part = -(-tiles // min(tiles, max(1, processors(query) // (groups * programs * batch))))
    grid = (groups * programs, -(-tiles // part), batch)
    sums = torch.empty(batch, groups, programs, grid[1], m, table.shape[1], device=query.device)
    peaks, totals = (torch.empty(sums.shape[:-1], device=query.device) for _ in range(2))
    with torch.cuda.device_of(query):
        _partial_means[grid](
            (query * layer.scaling)[..., order.flatten()].contiguous(), rows, k_up, k_mean, cos, sin, masks, table,
            gains, code.levels, sums, peaks, totals, seen, part * tile, rows.stride(0), rows.stride(2), *mask_strides,
            *cos.stride(), len(code.sink), queries, length, heads // kv_heads * length, of_keys[0].shape[-1] // 2,
            programs, table.shape[1], columns, pairs, m, tile, CHUNK, layer.softcap or 0.0, kind,
            torch.finfo(query.dtype).min, not query.is_cuda, num_warps=8, num_stages=2,
        )  # fmt: skip
    share = (peaks - peaks.amax(3, keepdim=True)).exp()  # B groups programs parts M
    mean = (sums * share.unsqueeze(-1)).sum(3) / (totals * share).sum(3).unsqueeze(-1)
    return mean.flatten(2, 3)[:, :, :queries, : len(code.sink) + 1].reshape(batch, heads, length, -1)
