"""Reads text files, globs and datasets into documents."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mhconvert import extras
from mhconvert.errors import TextError

from ..storage.regular_file import require_regular
from ..storage.unicode_text import lone_surrogate
from .conversations import Messages, conversation_field, messages_of
from .text_files import TEXT_SUFFIXES, records, require_reader

DATASET_DOCUMENTS = 2000  # read from a streamed dataset by default

Chat = Callable[[Messages], str]  # messages -> text, by the tokenizer's chat template
OnBad = Callable[[str], None]  # takes where a record is and why it has no text


def read(
    source: str, *, chat: Chat | None = None, characters: int | None = None, on_bad: OnBad | None = None
) -> list[list[str]]:
    """The documents of each file that `source` matches, or of the dataset with that name.

    Args:
        source: a file, a glob pattern, or a dataset as `name` or `name:config`.
        chat: formats records that have a conversation instead of `text`; None if there is no chat template.
        characters: to read from a dataset; None for DATASET_DOCUMENTS documents.
        on_bad: called with the reason for each record that has no text, which is skipped; None: it is an error.

    Raises:
        TextError: a text is missing or unreadable.
    """
    paths = files(source)
    if not paths:
        return [_read_dataset(source, chat, characters, on_bad)]
    return [read_file(path, chat=chat, on_bad=on_bad) for path in paths]


def check_sources(sources: tuple[str, ...]) -> None:
    """Check that the files exist, and that the library is there which reads them or the datasets; reads no text.

    Raises:
        TextError: a file is missing or not readable, a pattern matches nothing, a source is a folder, or a library
            is not installed.
    """
    for source in sources:
        paths = files(source)
        if not paths:
            _require_datasets(source)
        for path in paths:
            if not os.access(path, os.R_OK):
                reason = "no permission" if path.exists() else "there is no such file"
                raise TextError(f"text file {path} cannot be read: {reason}")
            require_reader(path)


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
    if not path.is_dir():
        require_regular(path, TextError)
    if path.is_file() or path.suffix.lower() in TEXT_SUFFIXES:
        return [path]
    if path.is_dir():
        raise TextError(f"'{source}' is a folder; name its files, for example '{source}/*.jsonl'")
    return []


def read_file(path: Path, *, chat: Chat | None = None, on_bad: OnBad | None = None) -> list[str]:
    """The documents of one file; arguments and errors as of `read`."""
    return list(_documents(records(path), f"text file {path}", chat, on_bad))


def chat_format(tokenizer: Any) -> Chat | None:
    """The tokenizer's chat template as a function; None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


def _documents(
    numbered: Iterable[tuple[str, Any]], source: str, chat: Chat | None, on_bad: OnBad | None
) -> Iterator[str]:
    """The document of each (place, record); a record without one goes to `on_bad`, or raises TextError."""
    for place, record in numbered:
        try:
            document = _document(record, chat)
            if (fault := lone_surrogate(document)) is not None:
                raise TextError(f"its text cannot be used: {fault}")
        except TextError as error:
            reason = f"{source}, {place}: {error}"
            if on_bad is None:
                raise TextError(reason) from error
            on_bad(reason)
        else:
            yield document


def _document(record: Any, chat: Chat | None) -> str:
    """The text of one record; raises TextError with the reason if it has none."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise TextError("not a JSON object with a text or a conversation")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    field = conversation_field(record)
    if field is None:
        found = (
            f"'text' is {json.dumps(record['text'])[:40]}" if "text" in record else f"it has {_names(record)}"
        )
        raise TextError(
            f"no text in 'text', 'messages', 'conversations', or 'instruction' and 'output'; {found}"
        )
    if chat is None:
        raise TextError(f"it has '{field}', and there is no chat template that makes text of them")
    messages = messages_of(record)
    try:
        return chat(messages)
    except Exception as error:  # a template is a program, which raises errors of many classes
        raise TextError(f"the chat template refuses it: {' '.join(str(error).split())}") from error


def _names(record: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in record) or "no fields"


def _require_datasets(name: str) -> None:
    """Raises TextError where datasets is not installed."""
    extras.require("datasets", f"'{name}' is no file, and a dataset", "text files do without", TextError)


def _read_dataset(name: str, chat: Chat | None, characters: int | None, on_bad: OnBad | None) -> list[str]:
    """The first documents of the train split of a streamed dataset."""
    _require_datasets(name)
    import datasets

    identifier, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(identifier, config or None, split="train", streaming=True)
        rows = ((f"row {number}", row) for number, row in enumerate(stream, start=1))
        texts = _documents(rows, f"dataset {name}", chat, on_bad)
        if characters is None:
            return list(islice(texts, DATASET_DOCUMENTS))
        return list(_take_characters(texts, characters))
    except TextError:
        raise
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
