"""The prompts that models continue: forty of our own, or the user's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mhconvert.errors import MhconvertError, TextError

from ...convert.calibration import text_files
from ...convert.calibration.token_rows import require_embedded
from ...convert.open_model import OpenModel
from ...convert.recipe.tolerance import OWN_PROMPTS
from ...convert.storage.unicode_text import lone_surrogate
from ..generation import encode
from ..settings import EvalSettings
from ..tasks.task_choice import suites
from .text_figures import FORMATS

OWN = "prompts.jsonl"  # in this package


@dataclass(frozen=True)
class Prompt:
    """A user's message.

    Attributes:
        text: what is asked.
        kind: question, story, and so on; "" where a file does not say it.
        language: of the answer, as en or de; "" where a file does not say it.
        format: of FORMATS, in which the answer is asked for; None: free.
    """

    text: str
    kind: str = ""
    language: str = ""
    format: str | None = None


@dataclass(frozen=True)
class Asked:
    """What the models are asked.

    Attributes:
        prompts: at least one.
        source: the name of their file; OWN_PROMPTS for our own.
        max_new_tokens: of a text.
    """

    prompts: list[Prompt]
    source: str
    max_new_tokens: int


def asked(settings: EvalSettings) -> Asked | None:
    """What the settings, or else the suite that they name, ask the models to write; None where they do not.

    Raises TextError as `read`.
    """
    if settings.generation:
        file = settings.prompts_file
        return Asked(read(file), file.name if file else OWN_PROMPTS, settings.max_new_tokens)
    of_suite = suites()[settings.suite].get("generation") if settings.suite else None
    if of_suite is None:
        return None
    return Asked(read(None)[: of_suite["prompts"]], OWN_PROMPTS, of_suite["max_new_tokens"])


def read(path: Path | None) -> list[Prompt]:
    """The prompts of a file, one a line, or JSON lines with `prompt` and perhaps kind, language and format.

    path: None: our own. Raises TextError for a file that is empty, no text, or has a line without a prompt.
    """
    file = path or Path(str(resources.files(__package__))) / OWN
    prompts: list[Prompt] = []
    for place, record in text_files.records(file):
        if isinstance(record, str):
            prompts += [Prompt(line.strip()) for line in record.split("\n") if line.strip()]
        else:
            prompts.append(_prompt(record, f"{file}, {place}"))
    if not prompts:
        raise TextError(f"{file} has no prompts; write one a line, or JSON lines with 'prompt'")
    return prompts


def _prompt(record: Any, place: str) -> Prompt:
    fields = record if isinstance(record, dict) else {}
    text, form = fields.get("prompt"), fields.get("format")
    if not isinstance(text, str) or not text.strip():
        raise TextError(f"{place}: it has no text in 'prompt'")
    if (fault := lone_surrogate(text)) is not None:
        raise TextError(f"{place}: its prompt cannot be used: {fault}")
    if form is not None and form not in tuple(FORMATS):
        raise TextError(f"{place}: format {form!r} is none of {', '.join(FORMATS)}")
    return Prompt(text, str(fields.get("kind") or ""), str(fields.get("language") or ""), form)


def has_template(opened: OpenModel) -> bool:
    """Whether the model's tokenizer has a chat template."""
    return bool(getattr(opened.tokenizer(), "chat_template", None))


def prompt_rows(opened: OpenModel, asked: Asked) -> list[list[int]]:
    """Token ids of each prompt, as `token_rows`. Raises MhconvertError too where the model reads fewer tokens than a
    prompt and the new ones."""
    rows = token_rows(opened, asked.prompts)
    lengths = [len(row) for row in rows]
    longest, new_tokens = max(lengths), asked.max_new_tokens
    try:
        opened.require_length(longest + new_tokens)
    except MhconvertError as error:
        way_out = (
            "shorten or leave out that prompt" if asked.source != OWN_PROMPTS else "ask others with --prompts"
        )
        if (room := (opened.longest or 0) - longest) > 0:
            way_out = f"choose at most {room} with --max-new-tokens, or {way_out}"
        raise MhconvertError(
            f"{error}: {longest} of prompt {1 + lengths.index(longest)} and {new_tokens} new ones; {way_out}"
        ) from error
    return rows


def token_rows(opened: OpenModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a user message in the model's chat template, plain text where it has none.

    Raises MhconvertError: the template refuses a prompt, or one has no tokens or one without an embedding.
    """
    tokenizer, chat, rows = opened.tokenizer(), has_template(opened), []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = encode(tokenizer, prompt.text, chat, remedy="take that prompt out")["input_ids"]
        except MhconvertError as error:
            raise MhconvertError(f"{opened.reference}, prompt {number}: {error}") from error
        if ids.shape[1] == 0:
            raise MhconvertError(f"{opened.reference}, prompt {number}: it has no tokens; take it out")
        require_embedded(ids, tokenizer, opened.vocab_size)
        rows.append(ids[0].tolist())
    return rows
