"""Calibration text → rows of token ids: files, dataset names, or text that the donor writes itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CalibrationError
from mhconvert.progress import Listener, Progress

from . import documents

CHARACTERS_A_TOKEN = 4  # a window of text is drawn as long as a row probably is
SAMPLED_ROWS = 32  # written by the donor at the same time


def text_rows(sources: tuple[str, ...], tokenizer: Any, rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) token ids drawn evenly from all files and datasets, in random order that `seed` fixes.

    A row starts with the beginning-of-text token if the tokenizer puts one there. Raises CalibrationError for
    text that is missing, unreadable or too short.
    """
    texts = [found for source in sources for found in documents.read(source)]
    prefix = start_of_text(tokenizer)
    streams = [
        _token_rows("\n\n".join(found), tokenizer, prefix, length, random.Random(f"{seed} {number}"))
        for number, found in enumerate(texts)
    ]
    found: list[list[int]] = []
    while streams and len(found) < rows:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            elif len(found) < rows:
                found.append(row)
    if len(found) < rows:
        raise CalibrationError(
            f"the calibration text has {len(found) * length} tokens in rows of {length}, and {rows * length} are "
            "needed (held-out rows included); add text, or ask for fewer with --calibration-tokens"
        )
    random.Random(seed).shuffle(found)
    return torch.tensor(found)


def sampled_rows(
    model: Any, tokenizer: Any, rows: int, length: int, seed: int, on_progress: Listener
) -> Tensor:
    """(rows, length) token ids that `model` writes at temperature 1, each row from a random first token.

    Text goes on after an end-of-text token. Reproducible for a seed on one machine.
    """
    prefix = start_of_text(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    starts = ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]
    starts = torch.cat((torch.tensor(prefix, dtype=torch.long).expand(rows, -1), starts), dim=1)
    written = []
    for first in range(0, rows, SAMPLED_ROWS):
        written.append(_sample(model, starts[first : first + SAMPLED_ROWS], length, generator))
        done = min(rows, first + SAMPLED_ROWS) * length
        on_progress(Progress("calibrate", done, rows * length, "text sampled from the donor"))
    return torch.cat(written)


@torch.inference_mode()
def _sample(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Continue each row of `ids` to `length` tokens, with the KV cache."""
    output = model(input_ids=ids.to(model.device), use_cache=True)
    while ids.shape[1] < length:
        weights = output.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(weights, 1, generator=generator)
        ids = torch.cat((ids, token), dim=1)
        if ids.shape[1] < length:
            cache = output.past_key_values
            output = model(input_ids=token.to(model.device), past_key_values=cache, use_cache=True)
    return ids


def start_of_text(tokenizer: Any) -> list[int]:
    """The beginning-of-text ids that the tokenizer puts before any text; often none."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _token_rows(
    text: str, tokenizer: Any, prefix: list[int], length: int, chance: random.Random
) -> Iterator[list[int]]:
    """Rows of `length` ids from windows of `text` in random order, without repetition."""
    width = length * CHARACTERS_A_TOKEN
    starts = list(range(0, len(text), width))
    chance.shuffle(starts)
    pending: list[int] = []
    for start in starts:
        ids = tokenizer(text[start : start + width], add_special_tokens=False, verbose=False)["input_ids"]
        pending += ids
        while len(pending) >= length - len(prefix):
            body = length - len(prefix)
            yield prefix + pending[:body]
            pending = pending[body:]
