"""How closely a converted model follows its donor: perplexity, KL divergence, top-1 agreement.

Logits are taken in row by row and only float64 sums are kept. `evaluate` gives the numbers in docs/measured.md.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhconvert.errors import MhconvertError

from ..convert.calibration import documents

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CHUNK = 128  # positions whose probabilities are in memory at once: 128 x 49,152 x 4 bytes = 25 MB
STRETCH = (
    32  # predictions that count as one in standard errors, as those of neighbours are alike; divides CHUNK
)


@dataclass
class Fidelity:
    """Sums over predictions, in natural logarithms. The divergence is KL(donor ‖ converted).

    A prediction is one position's logits and the token that follows it. `stretches` has of up to STRETCH predictions
    of a call their number, and the sums of converted − donor NLL and of the divergence.
    """

    tokens: int = 0
    donor_nll: float = 0.0
    converted_nll: float = 0.0
    divergence: float = 0.0
    agreements: int = 0
    stretches: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, donor: Tensor, converted: Tensor, targets: Tensor) -> None:
        """Adds predictions to the sums, which do not depend on how they are grouped into calls, to float64 rounding.

        Args:
            donor, converted: logits (positions, vocab_size) of any float dtype.
            targets: (positions,) int64, the tokens that follow.
        """
        if donor.shape != converted.shape or targets.shape != donor.shape[:1]:
            raise ValueError(
                f"shapes {tuple(donor.shape)}, {tuple(converted.shape)}, {tuple(targets.shape)} do not fit"
            )
        for start in range(0, targets.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            following = targets[rows, None]
            reference = donor[rows].float().log_softmax(-1)
            candidate = converted[rows].float().log_softmax(-1)
            theirs, ours = (-_sums(each.gather(1, following)) for each in (reference, candidate))
            divergence = divergences(reference, candidate)
            self.donor_nll += theirs.sum().item()
            self.converted_nll += ours.sum().item()
            self.agreements += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
            self.divergence += divergence.sum().item()
            for more, kl in zip((ours - theirs).split(STRETCH), divergence.split(STRETCH), strict=True):
                self.stretches.append((len(kl), more.sum().item(), kl.sum().item()))
        self.tokens += targets.shape[0]

    def merge(self, other: Fidelity) -> None:
        """Adds the sums of other predictions."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def result(self) -> dict[str, Any]:
        """perplexity {donor, converted}, kl (nats per token), top1_agreement (fraction), tokens (predictions)."""
        if not self.tokens:
            raise MhconvertError("there is no prediction to measure; rows need at least 2 tokens")
        return {
            "perplexity": {
                "donor": perplexity(self.donor_nll, self.tokens),
                "converted": perplexity(self.converted_nll, self.tokens),
            },
            "kl": self.divergence / self.tokens,
            "top1_agreement": self.agreements / self.tokens,
            "tokens": self.tokens,
        }

    def errors(self) -> dict[str, float | None]:
        """log_ratio_stderr, kl_stderr: standard errors of ln(converted ÷ donor perplexity) and of kl, over stretches.

        None for fewer than two stretches, or where they are not finite. Source: the variance of a ratio estimator.
        """
        names, number = ("log_ratio_stderr", "kl_stderr"), len(self.stretches)
        if number < 2:
            return dict.fromkeys(names)
        sizes, *sums = torch.tensor(self.stretches, dtype=torch.float64).T
        off = [each - sizes * (each.sum() / sizes.sum()) for each in sums]
        errors = [(each.square().sum() * number / (number - 1)).sqrt().item() / self.tokens for each in off]
        return {
            name: error if math.isfinite(error) else None for name, error in zip(names, errors, strict=True)
        }


def divergences(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference ‖ candidate) in nats at each position: (…) float64, on the CPU.

    reference, candidate: log-probabilities (…, vocab_size), float32; one of them may stand for several of the other.
    """
    probability = reference.exp()
    # A token of probability 0 in both adds 0, one of probability 0 in the candidate only infinity.
    return _sums(torch.where(probability > 0, probability * (reference - candidate), 0.0))


def compare_rows(
    donor: Callable[[Tensor], Tensor],
    converted: Callable[[Tensor], Tensor],
    rows: Tensor,
    on_row: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """The fidelity over `rows`; the logits of one row of each model are in memory at a time.

    Args:
        donor, converted: from token ids (1, length) to logits (1, length, vocab_size).
        rows: (rows, length) token ids, with length − 1 predictions per row.
        on_row: called with the rows done and the number of rows.
    """
    fidelity = Fidelity()
    with torch.inference_mode():
        for index, row in enumerate(rows):
            ids = row[None]
            fidelity.add(donor(ids)[0, :-1], converted(ids)[0, :-1], row[1:])
            if on_row is not None:
                on_row(index + 1, len(rows))
    return fidelity


def text_rows(
    tokenizer: Any,
    text: Path,
    sequence_length: int,
    sequences: int,
    plain_chat: documents.Chat | None = None,
    remedy: str | None = None,
) -> Tensor:
    """The first tokens of the file as rows (sequences, sequence_length) int64, without special tokens or overlap.

    The file is plain text, or has documents as calibration text does, which are joined by empty lines. `plain_chat`
    makes text of conversations where the tokenizer has no chat template; None: they are refused then. `remedy` is what
    to do about a text that is too short, by default to ask for less.

    Raises MhconvertError when the text is unreadable or too short.
    """
    if sequence_length < 2 or sequences < 1:
        raise MhconvertError(
            f"sequence length {sequence_length} and {sequences} sequences make no prediction; use at least 2 and 1"
        )
    chat = documents.chat_format(tokenizer) or plain_chat
    content = "\n\n".join(documents.read_file(text, chat=chat))
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    needed = sequence_length * sequences
    if len(ids) < needed:
        fewer = f"--sequences ≤ {len(ids) // sequence_length} or " if len(ids) >= sequence_length else ""
        raise MhconvertError(
            f"{text} has {len(ids)} tokens and {sequences} × {sequence_length} = {needed} are asked for; "
            + (remedy or f"choose {fewer}a shorter --sequence-length, or more text")
        )
    return torch.tensor(ids[:needed], dtype=torch.long).view(sequences, sequence_length)


def evaluate(
    converted: torch.nn.Module,
    donor: torch.nn.Module,
    rows: Tensor,
    on_row: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`Fidelity.result()` and `errors()` of two causal language models over `rows`, and the seconds taken."""
    started = time.perf_counter()
    fidelity = compare_rows(_logits(donor), _logits(converted), rows, on_row)
    return fidelity.result() | fidelity.errors() | {"seconds": time.perf_counter() - started}


def _logits(model: Any) -> Callable[[Tensor], Tensor]:
    def forward(input_ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        return logits.cpu()

    return forward


def _sums(values: Tensor) -> Tensor:
    """The sums (…) of (…, n) in float64; in float32 where the device has no float64."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return values.sum(-1, dtype=dtype).cpu().double()


def perplexity(nll: float, tokens: int) -> float:
    """exp(nll / tokens); infinity where float64 overflows."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
