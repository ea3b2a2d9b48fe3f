"""Calibration text → rows of token ids: files, dataset names, or text that the donor writes itself."""

from __future__ import annotations

import glob
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.convert.errors import CalibrationError
from mhconvert.convert.progress import Listener, Progress

CHARACTERS_A_TOKEN = 4  # a window of text is drawn as long as a row probably is
TEXT_SUFFIXES = (".txt", ".raw", ".md", ".jsonl")
SAMPLED_ROWS = 32  # written by the donor at the same time
DATASET_DOCUMENTS = 2000  # read from a streamed dataset


def text_rows(sources: tuple[str, ...], tokenizer: Any, rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) token ids drawn evenly from all files and datasets, in random order that `seed` fixes.

    A row starts with the beginning-of-text token if the tokenizer puts one there. Raises CalibrationError for
    text that is missing, unreadable or too short.
    """
    texts = [text for source in sources for text in _open(source)]
    prefix = _prefix(tokenizer)
    streams = [
        _token_rows(text, tokenizer, prefix, length, random.Random(f"{seed} {number}"))
        for number, (_, text) in enumerate(texts)
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


def check_sources(sources: tuple[str, ...]) -> None:
    """Raises CalibrationError for a file that is not there, a pattern without a match, or a folder. Reads nothing."""
    for source in sources:
        for path in _paths(source):
            if not os.access(path, os.R_OK):
                reason = "no permission" if path.exists() else "there is no such file"
                raise CalibrationError(f"calibration file {path} cannot be read: {reason}")


def sampled_rows(
    model: Any, tokenizer: Any, rows: int, length: int, seed: int, on_progress: Listener
) -> Tensor:
    """(rows, length) token ids that `model` writes at temperature 1, each row from a random first token.

    Text goes on after an end-of-text token. Reproducible for a seed on one machine.
    """
    prefix = _prefix(tokenizer)
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


def _prefix(tokenizer: Any) -> list[int]:
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


def _open(source: str) -> list[tuple[str, str]]:
    """(name, text) of each file that `source` stands for, or of the dataset of that name."""
    paths = _paths(source)
    return [(str(path), _read(path)) for path in paths] if paths else [(source, _dataset(source))]


def _paths(source: str) -> list[Path]:
    """The files that `source` stands for; none when it can only be the name of a dataset."""
    source = os.path.expanduser(source)  # the shell leaves a quoted ~ alone
    path = Path(source)
    if glob.has_magic(source) and not path.is_file():
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
        if not paths:
            raise CalibrationError(f"no calibration file matches '{source}'")
        return paths
    if path.is_file() or path.suffix in TEXT_SUFFIXES:
        return [path]
    if path.is_dir():
        raise CalibrationError(
            f"calibration '{source}' is a folder; name its files, for example '{source}/*.jsonl'"
        )
    return []


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CalibrationError(f"calibration file {path} cannot be read: {reason}") from error
    if path.suffix != ".jsonl":
        return content
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() also breaks inside strings
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError("text is no string")
            documents.append(text)
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"calibration file {path}, line {number}: not a JSON object with a 'text' field"
            ) from error
    return "\n\n".join(documents)


def _dataset(name: str) -> str:
    """The text of the first documents of a dataset, streamed: `name`, `name:config`; its train split."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"calibration '{name}' is no file; to read a dataset of that name: pip install 'mhconvert[datasets]'"
        ) from error
    identifier, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(identifier, config or None, split="train", streaming=True)
        documents = [str(row["text"]) for row in stream.take(DATASET_DOCUMENTS)]
    except Exception as error:  # the datasets library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"calibration '{name}' is neither a file nor a dataset that can be read: {reason}"
        ) from error
    return "\n\n".join(documents)
