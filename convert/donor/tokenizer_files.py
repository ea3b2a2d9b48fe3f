"""Loads the tokenizer in a model folder, and says of a damaged one which file it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mhconvert.errors import CheckpointError, UnsupportedError

from ..storage.regular_file import require_regular
from ..storage.safetensors_reader import read_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
EMPTY = "its vocabulary is empty"
REMEDY = "take the tokenizer's files anew from where the model came from"


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: transformers cannot load one.
        UnsupportedError: the tokenizer has code of its own and `trust_remote_code` is not set; the converted
            checkpoint would need that code too.
    """
    if _has_code(folder) and not trust_remote_code:
        raise UnsupportedError(
            f"the tokenizer in {folder} runs code of its own (auto_map); --trust-remote-code allows it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not tokenizer.vocab_size:
            raise ValueError(EMPTY)
    except Exception as error:  # tokenizers raises the base class itself
        place, reason = _damaged(folder), " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {place} cannot be loaded: {reason}; {REMEDY}") from error
    return tokenizer


def require_tokenizer(folder: Path) -> None:
    """Raises CheckpointError for a tokenizer in `folder` that is damaged; a folder without tokenizer.json has none.

    No code runs: a tokenizer with code of its own counts as whole where its tokenizer.json is.
    """
    file = folder / TOKENIZER
    require_regular(file)
    if not file.is_file():
        return
    if not _has_code(folder):
        load_tokenizer(folder, False)
    elif (fault := _fault(file)) is not None:
        raise CheckpointError(f"the tokenizer in {file} cannot be loaded: {fault}; {REMEDY}")


def _has_code(folder: Path) -> bool:
    """Whether the tokenizer names code of its own. Raises CheckpointError for settings that cannot be read."""
    settings = folder / SETTINGS
    require_regular(settings)
    stated = read_json(settings) if settings.is_file() else {}
    auto_map, longest = stated.get("auto_map"), stated.get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, int | float | None):
        raise CheckpointError(f"{settings}: model_max_length={longest!r:.60} is not a number of tokens")
    return isinstance(auto_map, list) or (isinstance(auto_map, dict) and "AutoTokenizer" in auto_map)


def _damaged(folder: Path) -> Path:
    """The file for which the tokenizer in `folder` does not load, as far as can be told; `folder` itself otherwise."""
    file, settings = folder / TOKENIZER, folder / SETTINGS
    if not file.is_file():
        return folder
    if _fault(file) is not None:
        return file
    return settings if settings.is_file() else folder


def _fault(file: Path) -> str | None:
    """Why tokenizers cannot use a tokenizer.json; None where it can."""
    try:
        size = Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=False)
    except Exception as error:  # tokenizers raises the base class itself
        return " ".join(str(error).split())[:200]
    return None if size else EMPTY
