"""LongHeads (arXiv 2402.10685): each head attends to its best chunks, moved together so that none is too far away.

The cache holds keys with RoPE, as transformers leaves them. A chosen chunk is moved as a whole, and a score depends on
distances alone: so a query is turned back once for each chunk by the tokens left out between the two, and no key is
touched. Keys before RoPE would need a cache of our own, and turning the keys size times as many rotations.

Shapes: H query heads, G KV heads, T queries, S keys, N chunks, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rotation import turned

ALWAYS = 3  # the first chunk, the query's own and the one before it
TILE = 2048  # queries whose choices are in memory at a time


@dataclass(frozen=True)
class Chunks:
    """Which keys a query reads: all of them before position `trained`, `number` chunks of `size` tokens from there on.

    Attributes:
        inv_freq: (r / 2,), of the model's RoPE.
    """

    trained: int
    size: int
    number: int
    inv_freq: Tensor

    def represent(self, key: Tensor, known: Tensor | None = None) -> Tensor:
        """A key for each whole chunk, without RoPE: (G, N, d), float32. key (G, S, d); known: of the first chunks.

        It is the mean of the chunk's keys. The paper weights them by attention whose queries the chunk's own attention
        gives; no cache holds those, and weights by the mean key found no needle where the plain mean finds four of five
        (SmolLM2-135M-Instruct, 2,048 tokens, 16 chunks of 32).
        """
        done = 0 if known is None else known.shape[1]
        new = key[:, done * self.size : key.shape[1] // self.size * self.size].float()
        positions = torch.arange(done * self.size, done * self.size + new.shape[1], device=key.device)
        found = turned(new, -positions, self.inv_freq).unflatten(1, (-1, self.size)).mean(2)
        return found if known is None else torch.cat((known, found), dim=1)

    def choose(self, query: Tensor, representations: Tensor, positions: Tensor) -> Tensor:
        """Which chunks each query reads: (H, T, N) bool. query (H, T, d), positions (T,), representations (G, N − 1, d)
        or of more chunks, which are not looked at before they are two chunks back.
        """
        own = (positions // self.size).unsqueeze(-1)  # T 1
        plain = turned(query.float(), -positions, self.inv_freq)
        groups = plain.unflatten(0, (len(representations), -1)).flatten(1, 2)  # G H/G·T d
        scores = (groups @ representations.mT).unflatten(1, (-1, len(positions))).flatten(0, 1)
        chunk = torch.arange(int(own.max()) + 1, device=query.device)
        free = (chunk > 0) & (chunk < own - 1)  # T N
        scores = scores[..., : len(chunk)]
        scores = pad(scores, (0, len(chunk) - scores.shape[-1])).masked_fill(~free, -torch.inf)
        best = scores.topk(min(self.number - ALWAYS, len(chunk)), dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & free
        return chosen | (chunk == 0) | ((chunk <= own) & (chunk >= own - 1))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, first: int, scaling: float, found: Tensor
    ) -> Tensor:
        """Outputs (H, T, d), float32, of queries (H, T, d) at positions first …, all at least `trained`.

        key, value (G, S, d) from position 0; found: what `represent` makes of key.
        """
        outputs = []
        for start in range(0, query.shape[1], TILE):
            tile = query[:, start : start + TILE]
            positions = torch.arange(tile.shape[1], device=query.device) + first + start
            chosen = self.choose(tile, found, positions)
            outputs.append(self._read(tile, key, value, positions, chosen, scaling))
        return torch.cat(outputs, dim=1)

    def _read(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, chosen: Tensor, scaling: float
    ) -> Tensor:
        """`attend` for chosen (H, T, N). Each chunk meets the queries that chose it; their parts are merged."""
        own = positions // self.size
        chunk = torch.arange(chosen.shape[-1], device=query.device)
        later = chosen.sum(-1, keepdim=True) - chosen.cumsum(-1)  # chosen chunks behind each
        gaps = (own[:, None] - chunk - later) * self.size  # H T N: tokens left out between chunk and query
        merged = Merged(query)
        group = len(query) // len(key)
        for index in range(chosen.shape[-1]):
            span = slice(index * self.size, min((index + 1) * self.size, int(positions[-1]) + 1))
            for kv_head in range(len(key)):
                heads, rows = chosen[kv_head * group : (kv_head + 1) * group, :, index].nonzero(as_tuple=True)
                if len(rows):
                    heads = heads + kv_head * group
                    asked = turned(query[heads, rows].float(), -gaps[heads, rows, index], self.inv_freq)
                    scores = scored(asked, key[kv_head, span]) * scaling
                    hidden = torch.arange(span.start, span.stop, device=query.device) > positions[rows, None]
                    merged.add(heads, rows, scores.masked_fill_(hidden, -torch.inf), value[kv_head, span])
        return merged.result()


def scored(asked: Tensor, keys: Tensor) -> Tensor:
    """Products (R, L) of queries (R, d) with keys (L, d): every key that a query reads is read here."""
    return asked @ keys.float().mT


class Merged:
    """Softmax averages of values for queries (H, T, d) that meet their keys a part at a time."""

    def __init__(self, query: Tensor) -> None:
        self.highest = torch.full(query.shape[:2], -torch.inf, device=query.device)
        self.sums = torch.zeros(query.shape[:2], device=query.device)
        self.outputs = torch.zeros(query.shape, device=query.device)

    def add(self, heads: Tensor, rows: Tensor, scores: Tensor, values: Tensor) -> None:
        """The scores (R, L) of the queries at (heads, rows) with the values (L, d); each row has a finite one."""
        at, before = (heads, rows), self.highest[heads, rows]
        highest = torch.maximum(before, scores.amax(-1))
        weights = (scores - highest[:, None]).exp_()
        kept = (before - highest).exp()
        self.highest[at] = highest
        self.sums[at] = self.sums[at] * kept + weights.sum(-1)
        self.outputs[at] = self.outputs[at] * kept[:, None] + weights @ values.float()

    def result(self) -> Tensor:
        """The averages (H, T, d)."""
        return self.outputs / self.sums[..., None]
