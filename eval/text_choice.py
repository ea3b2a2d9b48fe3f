"""Which texts are read: the user's files, and the five kinds of a suite, of our own or from the local data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from mhconvert.errors import TextError

from ..convert.calibration.conversations import Messages
from ..convert.calibration.documents import Chat
from ..convert.calibration.text_files import TEXT_SUFFIXES, require_reader, told_apart
from ..convert.calibration.token_rows import require_embedded
from ..convert.open_model import OpenModel
from . import fidelity
from .settings import EvalSettings
from .tasks.task_choice import suites

OWN = "standard_texts"  # in this package: a file for each kind


@dataclass(frozen=True)
class Text:
    """A text that models read.

    Attributes:
        name: in results; unique among the texts of an evaluation.
        file: holds it.
        sequence_length, sequences: of its rows.
        kind: of a text of the suite; None: it is the user's.
        chat: makes text of conversations where there is no chat template; None: they are refused then.
    """

    name: str
    file: Path
    sequence_length: int
    sequences: int
    kind: str | None = None
    chat: Chat | None = None


def chosen(settings: EvalSettings) -> list[Text]:
    """The texts of the suite, then the user's files, each once, by its path where another text has its name."""
    files = list(dict.fromkeys(settings.text_files))
    shape = (settings.sequence_length, settings.sequences)
    wanted = suites()[settings.suite].get("texts") if settings.suite else None
    texts = _of_suite(wanted, settings.data_folder) if wanted else []
    names = told_apart(list(map(str, files)), [text.name for text in texts])
    return [*texts, *(Text(name, file, *shape) for name, file in zip(names, files, strict=True))]


def token_rows(texts: Sequence[Text], models: Sequence[OpenModel], *, beyond: bool) -> dict[str, Tensor]:
    """Token ids of each text (sequences, sequence_length), by its name, with the first model's tokenizer.

    Rows of the suite's texts are no longer than every model reads. beyond: rows of the user's may be.

    Raises:
        MhconvertError: a text is too short, a token has no embedding, or a model reads fewer tokens than a row has.
    """
    tokenizer, rows = models[0].tokenizer(), {}
    limits = [limit for model in models if (limit := model.longest)]
    for text in texts:
        length, remedy = text.sequence_length, None
        if text.kind:
            length = min([length, *limits])
            remedy = (
                f"lengthen the file, or leave it out of --data, so that our own text of {text.kind} is read"
            )
        ids = fidelity.text_rows(tokenizer, text.file, length, text.sequences, text.chat, remedy)
        require_embedded(ids, tokenizer, models[0].vocab_size)
        for model in () if beyond else models:
            model.require_length(length)
        rows[text.name] = ids
    return rows


def _of_suite(wanted: dict[str, Any], data: Path | None) -> list[Text]:
    """One text of each kind: the first file of `data` or its folders that has the kind's name, else our own.

    Raises TextError where `data` is no folder, or the library is not installed that reads a file.
    """
    if data is not None and not data.is_dir():
        raise TextError(f"--data {data} is no folder")
    own, texts = Path(str(resources.files(__package__))) / OWN, []
    for kind, others in wanted["kinds"].items():
        local = _local(data, kind, others) if data is not None else None
        name = f"{kind} ({local.name})" if local else kind
        file = local or next(own.glob(f"{kind}.*"))
        require_reader(file)
        texts.append(Text(name, file, wanted["sequence_length"], wanted["sequences"], kind, _plain_chat))
    return texts


def _local(data: Path, kind: str, others: list[str]) -> Path | None:
    found = [
        path
        for path in sorted(data.rglob("*"))
        if path.name in others
        or (path.name.partition(".")[0] == kind and path.suffix.lower() in TEXT_SUFFIXES)
    ]
    return next((path for path in found if path.is_file()), None)


def _plain_chat(messages: Messages) -> str:
    """A conversation for a model without a chat template: the role before each message, empty lines between them."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
