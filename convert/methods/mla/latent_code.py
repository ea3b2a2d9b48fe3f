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


def row_bytes(counts: list[int]) -> int:
    """Bytes of a token's row with `counts` components of each of WIDTHS: a gain, and the fields rounded up."""
    packed = ((sum(c for w, c in zip(WIDTHS, counts, strict=True) if w & field), field) for field in FIELDS)
    return 1 + sum(-(-count * field // 8) for count, field in packed)


def level_offset(width: int) -> int:
    """Where the levels of `width` begin in a layer's `levels`."""
    return sum(2**wider for wider in WIDTHS if wider > width)


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
        codes = [
            torch.bucketize(rest[..., start:stop].contiguous(), self._boundaries(width)).to(torch.uint8)
            for width, start, stop in self.ranges
        ]
        return torch.cat((first, self._packed(torch.cat(codes, dim=-1))), dim=-1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (..., R) -> (n + 1, T) of `dtype`: components about their centre, and whether that is the sink.

        kv_b_proj reads the last element too, and so knows the sink's keys and values whole, with what the components
        that have no bits would add. T tokens, all the rows in their order, are the last dimension, as every operation
        is then on long vectors.
        """
        columns = rows.flatten(0, -2).mT.contiguous()
        codes, levels = self._unpacked(columns[1:]), self.levels.to(dtype)
        latent = levels.new_empty(len(self.sink) + 1, columns.shape[1])
        for width, start, stop in self.ranges:
            of_width = levels[level_offset(width) : level_offset(width) + 2**width]
            torch.index_select(
                of_width, 0, codes[start:stop].flatten().int(), out=latent[start:stop].view(-1)
            )
        step = columns[:1] % SINK
        gain = torch.exp2(step.float() / GAIN_STEPS + LEAST_GAIN).masked_fill(step == NOT_FINITE, torch.nan)
        latent[:-1].mul_(gain.to(dtype))
        latent[-1:] = columns[:1] >= SINK
        return latent

    def _boundaries(self, width: int) -> Tensor:
        levels = self.levels[level_offset(width) : level_offset(width) + 2**width].float()
        return (levels[1:] + levels[:-1]) / 2

    def _packed(self, codes: Tensor) -> Tensor:
        """Codes (..., n) -> bytes (..., R - 1). Byte i of a field holds components i, i + size, i + 2 size, …"""
        packed = []
        for field, size, users in self.fields:
            # A width's fields hold its bits from the highest: what is below this field is shifted out.
            parts = [
                (codes[..., start:stop] >> (width % field)) & (2**field - 1) for width, start, stop in users
            ]
            values, each = torch.cat(parts, dim=-1), 8 // field
            values = nn.functional.pad(values, (0, size * each - values.shape[-1])).unflatten(
                -1, (each, size)
            )
            byte = values[..., 0, :]
            for place in range(1, each):
                byte = byte | values[..., place, :] << (place * field)
            packed.append(byte)
        return torch.cat(packed, dim=-1)

    def _unpacked(self, columns: Tensor) -> Tensor:
        """Bytes (R - 1, T) -> codes (n, T), uint8."""
        codes = columns.new_empty(len(self.sink), columns.shape[1])
        begin = 0
        for field, size, users in self.fields:
            byte, begin = columns[begin : begin + size], begin + size
            places = torch.arange(0, 8, field, dtype=torch.uint8, device=byte.device).view(-1, 1, 1)
            values, at = (torch.bitwise_right_shift(byte, places) & (2**field - 1)).flatten(0, 1), 0
            for width, start, stop in users:
                part = values[at : at + stop - start] * 2 ** (width % field)
                first = width < 2 * field
                (codes[start:stop].copy_ if first else codes[start:stop].bitwise_or_)(part)
                at += stop - start
        return codes
