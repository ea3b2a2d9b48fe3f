"""Reads text files, globs and datasets into documents."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from mhconvert.errors import TextError

TEXT_SUFFIXES = (".txt", ".raw", ".md", ".jsonl")
DATASET_DOCUMENTS = 2000  # read from a streamed dataset by default

Chat = Callable[[list[dict[str, Any]]], str]  # messages -> text, by the tokenizer's chat template


def read(source: str, *, chat: Chat | None = None, characters: int | None = None) -> list[list[str]]:
    """The documents of each file that `source` matches, or of the dataset with that name.

    Args:
        source: a file, a glob pattern, or a dataset as `name` or `name:config`.
        chat: formats records that have `messages` instead of `text`; None if there is no chat template.
        characters: to read from a dataset; None for DATASET_DOCUMENTS documents.

    Raises:
        TextError: a text is missing or unreadable.
    """
    paths = files(source)
    return [_read_file(path, chat) for path in paths] if paths else [_read_dataset(source, chat, characters)]


def check_sources(sources: tuple[str, ...]) -> None:
    """Check that the sources exist, without reading them.

    Raises:
        TextError: a file is missing or not readable, a pattern matches nothing, or a source is a folder.
    """
    for source in sources:
        for path in files(source):
            if not os.access(path, os.R_OK):
                reason = "no permission" if path.exists() else "there is no such file"
                raise TextError(f"text file {path} cannot be read: {reason}")


def files(source: str) -> list[Path]:
    """The files that `source` matches; empty if it can only be the name of a dataset.

    Raises:
        TextError: a pattern matches nothing, or the source is a folder.
    """
    source = os.path.expanduser(source)  # the shell does not expand a quoted ~
    path = Path(source)
    if glob.has_magic(source) and not path.is_file():
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
        if not paths:
            raise TextError(f"no text file matches '{source}'")
        return paths
    if path.is_file() or path.suffix in TEXT_SUFFIXES:
        return [path]
    if path.is_dir():
        raise TextError(f"'{source}' is a folder; name its files, for example '{source}/*.jsonl'")
    return []


def _read_file(path: Path, chat: Chat | None) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TextError(f"text file {path} cannot be read: {reason}") from error
    if path.suffix != ".jsonl":
        return [content]
    documents = []
    lines = content.split("\n")  # splitlines() would also split at other characters
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            documents.append(_text(json.loads(line), chat))
        except (ValueError, KeyError, TypeError) as error:
            wanted = "a 'text' field" if chat is None else "a 'text' or 'messages' field"
            raise TextError(f"text file {path}, line {number}: not a JSON object with {wanted}") from error
    return documents


def _text(record: dict[str, Any], chat: Chat | None) -> str:
    """The text of one record; raises KeyError or TypeError if it has none."""
    if chat is not None and "text" not in record:
        return chat(record["messages"])
    text = record["text"]
    if not isinstance(text, str):
        raise TypeError("text is no string")
    return text


def _read_dataset(name: str, chat: Chat | None, characters: int | None) -> list[str]:
    """The first documents of the train split of a streamed dataset."""
    import datasets

    identifier, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(identifier, config or None, split="train", streaming=True)
        texts = (_text(row, chat) for row in stream)
        if characters is None:
            return list(islice(texts, DATASET_DOCUMENTS))
        return list(_take_characters(texts, characters))
    except Exception as error:  # datasets raises errors of many classes
        reason = " ".join(str(error).split())[:200]
        raise TextError(f"'{name}' is neither a file nor a dataset that can be read: {reason}") from error


def _take_characters(texts: Iterable[str], characters: int) -> Iterable[str]:
    """The first of `texts` until they have `characters` characters together."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
