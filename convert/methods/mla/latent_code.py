"""The code of a cached token: the components of its latent in 0 to 8 bits each, as one row of bytes.

This file is shipped inside converted checkpoints: it imports torch only.

Shapes: T tokens, n components with at least one bit, R bytes of a row.
"""

import torch
from torch import Tensor, nn

WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)  # bits of a component; components are sorted by width, the widest first
FIELDS = (8, 4, 2, 1)  # bits; a width is the sum of fields, and fields of one size are packed together
GAIN_STEPS = 7  # a factor of two
LEAST_GAIN = -8  # log2; the largest is 2^10, as some tokens have a hundred times the energy of others
NOT_FINITE = 127  # the gain of a token that is not finite: it decodes as NaN, as the donor would spread it
SINK = 128  # the bit of a row's first byte that says which centre the token was coded about
LEVELS = sum(2**width for width in WIDTHS)
# Up to so many tokens the number of operations is what takes time: all widths go through them together.
FEW_TOKENS = 64
LARGEST, APART = 2.0**10, 2.0**12  # of a component, and between the levels of two widths in that search


def row_bytes(counts: list[int]) -> int:
    """Bytes of a token's row with `counts` components of each of WIDTHS: a gain, and the fields rounded up."""
    packed = ((sum(c for w, c in zip(WIDTHS, counts, strict=True) if w & field), field) for field in FIELDS)
    return 1 + sum(-(-count * field // 8) for count, field in packed)


def level_offset(width: int) -> int:
    """Where the levels of `width` begin in a layer's `levels`."""
    return sum(2**wider for wider in WIDTHS if wider > width)


def interval(x: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the ascending boundaries are less than x: uint8. Few are compared faster than they are searched."""
    if len(boundaries) > 7:
        return torch.bucketize(x, boundaries).to(torch.uint8)
    found = (x > boundaries[0]).to(torch.uint8)
    for boundary in boundaries[1:]:
        found.add_(x > boundary)
    return found


class Constants:
    """Tensors that belong to no checkpoint, on the device where they are asked for: no buffers, which a model that is
    made without memory leaves undefined."""

    def __init__(self, *tensors: Tensor):
        self.on = {torch.device("cpu"): tensors}

    def __call__(self, like: Tensor) -> tuple[Tensor, ...]:
        if like.device in self.on:
            return self.on[like.device]
        with torch.inference_mode(False):
            copies = tuple(tensor.to(like.device) for tensor in self.on[torch.device("cpu")])
        if not torch.compiler.is_compiling() and type(like) is Tensor:
            self.on[like.device] = copies
        return copies


class BitMoves:
    """Bytes (count, T), each put together of bits of others (sources, T)."""

    def __init__(self, moves: list[tuple[int, int, int, int, int]], count: int):
        """moves: (source, target, bits to the right, mask of what is left, bits to the left)."""
        of_target: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        for source, target, right, mask, left in moves:
            of_target[target].append((source, right, mask, left))
        self.depth = max(map(len, of_target))
        nothing = (0, 0, 0, 0)
        table = torch.tensor(
            [[*one, *[nothing] * (self.depth - len(one))] for one in of_target], device="cpu"
        ).transpose(0, 1)
        columns = table.reshape(-1, 4).unbind(1)
        self.constants = Constants(columns[0], *(each.to(torch.uint8).unsqueeze(1) for each in columns[1:]))

    def __call__(self, of: Tensor) -> Tensor:
        at_once = 1 if of.shape[1] > FEW_TOKENS else self.depth
        parts = zip(
            *(each.split(len(each) // self.depth * at_once) for each in self.constants(of)), strict=True
        )
        found = None
        for source, right, mask, left in parts:
            part = of.index_select(0, source).bitwise_right_shift_(right).bitwise_and_(mask)
            part.bitwise_left_shift_(left)
            found = part if found is None else found.bitwise_or_(part)
        assert found is not None
        return found.unflatten(0, (at_once, -1)).sum(0, dtype=torch.uint8) if at_once > 1 else found


class LatentCode(nn.Module):
    """Codes whitened components (mean 0, variance 1 over tokens) with a gain for each token; decodes rows of bytes.

    Each token is coded about one of two centres: zero, or the `sink`, the components of a first token, on which models
    park their attention and which is nearly the same vector whatever the text. The nearer centre is taken, so that no
    position has to be known, and rows may be cropped, reordered and repeated like any tensor. What is left is divided
    by its RMS, and each component is rounded to the nearest level of its width.

    Persistent buffers, as no training should move what chooses a code:
        sink: (n,).
        levels: (LEVELS,), increasing within a width, the widest first.
        weight: (n,), what a unit error of a component costs, by which the nearer centre is judged.
    """

    def __init__(self, counts: list[int]):
        """
        Args:
            counts: components of each of WIDTHS.
        """
        super().__init__()
        self.counts, n = list(counts), sum(counts)
        self.sink: Tensor
        self.levels: Tensor
        self.weight: Tensor
        self.register_buffer("sink", torch.zeros(n))
        self.register_buffer("levels", torch.zeros(LEVELS))
        self.register_buffer("weight", torch.ones(n))
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.ranges = [
            (width, start, start + count)
            for width, start, count in zip(WIDTHS, starts, counts, strict=True)
            if count
        ]
        self.bytes = row_bytes(self.counts)
        # (bits, bytes, ranges of the components that have it) of each kind of field that a row has.
        self.fields: list[tuple[int, int, list[tuple[int, int, int]]]] = []
        for field in FIELDS:
            users = [(width, start, stop) for width, start, stop in self.ranges if width & field]
            if users:
                size = -(-sum(stop - start for _, start, stop in users) * field // 8)
                self.fields.append((field, size, users))
        moves = self._bit_moves()
        self.pack = BitMoves(moves, self.bytes - 1)
        self.unpack = BitMoves([(to, of, left, mask, right) for of, to, right, mask, left in moves], n)
        widths = [width for width, start, stop in self.ranges for _ in range(start, stop)]
        first = torch.tensor([level_offset(width) for width in widths], dtype=torch.int32, device="cpu")
        places = [place * APART for place, width in enumerate(WIDTHS) for _ in range(2**width)]
        apart = torch.tensor(places, dtype=torch.float64, device="cpu")
        self.first_levels = Constants(first.unsqueeze(1))
        self.apart = Constants(apart[first].unsqueeze(1), (apart[1:] + apart[:-1]) / 2)

    def _bit_moves(self) -> list[tuple[int, int, int, int, int]]:
        """(component, byte behind the gain, …) of each field, for BitMoves. Byte i of a kind of field holds components
        i, i + size, i + 2 size, …; a width's fields hold its bits from the highest."""
        moves, begin = [], 0
        for field, size, users in self.fields:
            having = [(width, n) for width, start, stop in users for n in range(start, stop)]
            for at, (width, n) in enumerate(having):
                place, byte = divmod(at, size)
                moves.append((n, begin + byte, width % field, 2**field - 1, place * field))
            begin += size
        return moves

    def forward(self, z: Tensor) -> Tensor:
        """What decoding gives of z (..., n): (..., n + 1), the latent as readers of the cache see it."""
        return self.decode(self.encode(z), z.dtype).mT.unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Components (..., n) -> rows (..., R), uint8."""
        z, sink, weight = z.float(), self.sink.float(), self.weight.float()
        to_zero = (z.square() * weight).sum(-1, keepdim=True)
        nearer = ((z - sink).square() * weight).sum(-1, keepdim=True) < to_zero
        rest = torch.where(nearer, z - sink, z)
        energy = rest.square().mean(-1, keepdim=True).clamp_min(1e-12)
        step = (energy.log2() * (GAIN_STEPS / 2)).round() - LEAST_GAIN * GAIN_STEPS
        step = step.clamp(0, NOT_FINITE - 1)
        rest = rest / torch.exp2(step / GAIN_STEPS + LEAST_GAIN)
        gain = torch.where(energy.isfinite(), step, NOT_FINITE).to(torch.uint8)
        first = gain + SINK * nearer.to(torch.uint8)
        codes = self._nearest(rest.flatten(0, -2).mT.contiguous())
        columns = torch.cat((first.flatten(0, -2).mT, self.pack(codes)))
        return columns.mT.contiguous().unflatten(0, z.shape[:-1])

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (..., R) -> (n + 1, T) of `dtype`: components about their centre, and whether that is the sink.

        kv_b_proj reads the last element too, and so knows the sink's keys and values whole, with what the components
        that have no bits would add. T tokens, all the rows in their order, are the last dimension, as every operation
        is then on long vectors.
        """
        columns = rows.flatten(0, -2).mT.contiguous()
        levels, codes = self.levels.to(dtype), self.unpack(columns[1:])
        latent = levels.new_empty(len(self.sink) + 1, columns.shape[1])
        few, first = columns.shape[1] <= FEW_TOKENS, self.first_levels(codes)[0]
        for start, stop in [(0, len(codes))] if few else [each[1:] for each in self.ranges]:
            at = codes[start:stop].int().add_(first[start:stop]).flatten()
            torch.index_select(levels, 0, at, out=latent[start:stop].view(-1))
        step = columns[:1] % SINK
        gain = torch.exp2(step.float() / GAIN_STEPS + LEAST_GAIN).masked_fill(step == NOT_FINITE, torch.nan)
        latent[:-1].mul_(gain.to(dtype))
        latent[-1:] = columns[:1] >= SINK
        return latent

    def _nearest(self, components: Tensor) -> Tensor:
        """The codes of components (n, T), those of the nearest levels of their widths: uint8."""
        levels = self.levels.float()
        boundaries = (levels[1:] + levels[:-1]) / 2
        if components.shape[1] > FEW_TOKENS or components.device.type == "mps":  # which has no float64
            parts = []
            for width, start, stop in self.ranges:
                begin = level_offset(width)
                parts.append(interval(components[start:stop], boundaries[begin : begin + 2**width - 1]))
            return torch.cat(parts)
        [first], (apart, between) = self.first_levels(components), self.apart(components)
        found = torch.bucketize(components.clamp(-LARGEST, LARGEST) + apart, boundaries + between)
        return (found - first).to(torch.uint8)
