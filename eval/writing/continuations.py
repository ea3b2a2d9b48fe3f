"""Texts that a model writes after prompts, and what another model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..fidelity import CHUNK, divergences
from ..generation import Options, continue_rows
from ..last_logits import last_logits


class Text(TypedDict):
    """What a model wrote.

    tokens: with the end token, if it ended by itself; ended: whether it did; nats: −log-probability of all tokens
    together, in the model that wrote them.
    """

    tokens: list[int]
    ended: bool
    nats: float


class Judged(TypedDict):
    """What the donor makes of a text. kl: KL(writer ‖ donor) in nats at each token; nats: −its log-probability."""

    kl: list[float]
    nats: float


class _ChosenLogProbs(LogitsProcessor):
    """Keeps the log-probability of each token that is chosen, and changes no score."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.hear(input_ids[:, -1])
        self.before = scores.float().log_softmax(-1)
        return scores

    def hear(self, tokens: Tensor) -> None:
        """Takes in the tokens (rows,) that were chosen after the last scores."""
        if self.before is not None:
            self.chosen.append(self.before.gather(1, tokens[:, None])[:, 0])


def write(model: Any, prompts: Sequence[Sequence[int]], options: Options) -> list[Text]:
    """The model's continuation of each prompt, all in one batch."""
    ends, length = end_tokens(model), max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
    heard = _ChosenLogProbs()
    with _plain(model, ends):
        output = continue_rows(
            model,
            {"input_ids": ids, "attention_mask": mask},
            options,
            logits_processor=LogitsProcessorList([heard]),
        ).sequences
    heard.hear(output[:, -1])
    nats = -torch.stack(heard.chosen, dim=1).double().cpu()
    texts: list[Text] = []
    for row, costs in zip(output[:, length:].tolist(), nats, strict=True):
        at = next((at for at, token in enumerate(row) if token in ends), None)
        size = len(row) if at is None else at + 1
        texts.append({"tokens": row[:size], "ended": at is not None, "nats": costs[:size].sum().item()})
    return texts


@contextmanager
def _plain(model: Any, ends: list[int]) -> Iterator[None]:
    """Generation without what the model's generation config adds, such as beams, filters, and penalties that would hide
    loops: of it the end tokens stay."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text of the model; [] for a model that has none, whose texts are as long as asked."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def judge(writer: Any, donor: Any, asked: Sequence[int], donor_asked: Sequence[int], text: Text) -> Judged:
    """What the donor makes of a text of the writer.

    asked, donor_asked: the prompt's tokens as each of the two is asked, which differ where a chat template was lost.
    """
    tokens = text["tokens"]
    ours, theirs = (
        last_logits(model, torch.tensor([[*prompt, *tokens[:-1]]]), len(tokens))
        for model, prompt in ((writer, asked), (donor, donor_asked))
    )
    following, kl, nats = torch.tensor(tokens), [], 0.0
    for start in range(0, len(tokens), CHUNK):
        rows = slice(start, start + CHUNK)
        here = ours[rows].float().log_softmax(-1)
        there = theirs[rows].float().log_softmax(-1).to(here.device)
        kl += divergences(here, there).tolist()
        nats -= there.cpu().gather(1, following[rows, None]).double().sum().item()
    return {"kl": kl, "nats": nats}


def log_prob(model: Any, before: Sequence[int], token: int) -> float:
    """The log-probability of `token` after the tokens `before`."""
    logits = last_logits(model, torch.tensor([list(before)]), 1)[0]
    return logits.float().log_softmax(-1)[token].item()
