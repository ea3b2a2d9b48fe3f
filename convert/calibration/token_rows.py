"""Rows of token ids, from text files and datasets or sampled from the donor."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CalibrationError, CheckpointError, TextError
from mhconvert.progress import Listener, Progress

from . import documents
from .growing_cache import growing_cache

CHARACTERS_A_TOKEN = 4  # typical ratio; sets the length of a window of text
# Rows that are sampled together; twice as many where their tokens are no more than SAMPLED_TOKENS.
SAMPLED_ROWS, SAMPLED_TOKENS = 32, 16384


def text_rows(
    sources: tuple[str, ...], tokenizer: Any, rows: int, length: int, seed: int
) -> tuple[Tensor, list[str]]:
    """Token ids (rows, length), drawn evenly from all files and datasets and shuffled with `seed`, and the file or
    dataset of each row.

    Every row starts with the beginning-of-text token if the tokenizer adds one.

    Raises:
        CalibrationError: the text is too short.
        TextError: a text is missing or unreadable.
    """
    chat = documents.chat_format(tokenizer)
    texts = [
        (str(name), text)
        for source in sources
        for name, text in zip(
            documents.files(source) or [Path(source)], documents.read(source, chat=chat), strict=True
        )
    ]
    prefix = start_of_text(tokenizer)
    streams = [
        (name, _token_rows("\n\n".join(text), tokenizer, prefix, length, random.Random(f"{seed} {number}")))
        for number, (name, text) in enumerate(texts)
    ]
    drawn: list[tuple[str, list[int]]] = []
    while streams and len(drawn) < rows:
        for stream in list(streams):
            row = next(stream[1], None)
            if row is None:
                streams.remove(stream)
            elif len(drawn) < rows:
                drawn.append((stream[0], row))
    if len(drawn) < rows:
        raise CalibrationError(
            f"the calibration text has {len(drawn) * length} tokens in rows of {length}, and {rows * length} are "
            "needed (held-out rows included); add text, or ask for fewer with --calibration-tokens"
        )
    random.Random(seed).shuffle(drawn)
    return torch.tensor([row for _, row in drawn]), [name for name, _ in drawn]


def sampled_rows(
    model: Any,
    tokenizer: Any,
    rows: int,
    length: int,
    seed: int,
    on_progress: Listener,
    prompts: Sequence[Sequence[int]] = (),
    vocab_size: int | None = None,
) -> Tensor:
    """Token ids (rows, length), sampled from `model` at temperature 1 after a random first token.

    Every second row continues one of the `prompts` instead, which have fewer tokens than a row, in their order and
    again from the first. Sampling continues after an end-of-text token. A seed gives the same rows only on the same
    machine. `vocab_size`: as of `continued`.
    """
    prefix = start_of_text(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    own = model.config.get_text_config().vocab_size
    known = min(len(tokenizer), own, vocab_size or own)
    ordinary = torch.tensor(sorted(set(range(known)) - set(tokenizer.all_special_ids)))
    chosen = ordinary[torch.randint(len(ordinary), (rows,), generator=generator)]
    begun = [[*prefix, token] for token in chosen.tolist()]
    for row, prompt in zip(range(1, rows, 2), cycle(prompts), strict=False):
        begun[row] = list(prompt)
    together = -(-rows // batches_of(rows, length))
    batches: list[Tensor] = []
    for start in range(0, rows, together):
        given = begun[start : start + together]
        for ids in continued(model, given, length, generator, growing_cache(), vocab_size):
            done = start * length + ids.numel()
            on_progress(Progress("calibrate", done, rows * length, "text sampled from the donor"))
        batches.append(ids)
    return torch.cat(batches)


def batches_of(rows: int, length: int) -> int:
    """In how many batches `rows` rows of `length` tokens are sampled."""
    together = 2 * SAMPLED_ROWS if 2 * SAMPLED_ROWS * length <= SAMPLED_TOKENS else SAMPLED_ROWS
    return -(-rows // together)


@torch.no_grad()  # what a module keeps of inference mode could not be trained with
def continued(
    model: Any,
    begun: list[list[int]],
    length: int,
    generator: torch.Generator,
    cache: Any = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """The first tokens of each row as they are continued by sampling, a token at a time, to (rows, length).

    Args:
        begun: for each row at least one token, and fewer than `length`.
        cache: an empty one; None for the model's own.
        vocab_size: the ids that may be sampled are below it; None for all that the model has.
    """
    ids = torch.tensor([row[: min(map(len, begun))] for row in begun])
    following = ids
    while ids.shape[1] < length:
        yield ids
        output = model(
            input_ids=following.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        likely = output.logits[:, -1, :vocab_size].float().softmax(-1)
        following = random_ids(likely, generator).cpu()
        for row, given in zip(following, begun, strict=True):
            if ids.shape[1] < len(given):
                row[0] = given[ids.shape[1]]
        ids, cache = torch.cat((ids, following), dim=1), output.past_key_values
    yield ids


def random_ids(probabilities: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """(rows, count): ids of each row of (rows, ids), each by one random number of the CPU's, where the rows are.

    `torch.multinomial` makes one for every id of the vocabulary.

    Raises CheckpointError for probabilities that are not finite.
    """
    summed = probabilities.cumsum(-1)
    whole = summed[:, -1:]
    if not (whole.isfinite() & (whole > 0)).all():
        raise CheckpointError(
            "the donor's predictions are not finite: its weights or its dtype overflow; try the donor in float32"
        )
    threshold = torch.rand(len(summed), count, generator=generator).to(whole.device) * whole
    # Rounding may give the whole, behind which there is no id.
    below = torch.nextafter(whole, torch.zeros_like(whole))
    return torch.searchsorted(summed, threshold.minimum(below), right=True)


def start_of_text(tokenizer: Any) -> list[int]:
    """[id] of the beginning-of-text token that the tokenizer adds to every text; [] if it adds none."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def require_embedded(ids: Tensor, tokenizer: Any, vocab_size: int) -> None:
    """Raises TextError for an id of the tokenizer that the model's embedding, of `vocab_size` rows, does not have."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise TextError(
            f"the text has token {largest} ({token!r}), and the model's embedding has {vocab_size} rows, none for it: "
            "leave it out of the text, or add rows to the model with resize_token_embeddings"
        )


def _token_rows(
    text: str, tokenizer: Any, prefix: list[int], length: int, generator: random.Random
) -> Iterator[list[int]]:
    """Rows of `length` ids, `prefix` included, from the windows of `text` in random order without repetition."""
    width, body = length * CHARACTERS_A_TOKEN, length - len(prefix)
    starts = list(range(0, len(text), width))
    generator.shuffle(starts)
    pending: list[int] = []
    for start in starts:
        window = text[start : start + width]
        pending += tokenizer(window, add_special_tokens=False, verbose=False)["input_ids"]
        while len(pending) >= body:
            yield prefix + pending[:body]
            pending = pending[body:]
