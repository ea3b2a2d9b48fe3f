"""Removes local paths from published text: of each path only its last part stays."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from mhconvert.errors import CheckpointError

from ..convert.donor.hub_download import TEXT_FILES
from .published_files import CONFIGS

TEXTS = (".json", ".yaml", ".yml", ".md", ".html", ".svg", ".jsonl")
KEPT = (*TEXT_FILES, "*.safetensors.index.json")  # a token may look like a path
TOLD_BY = (".json", ".yaml", ".yml")
LONGEST = 1024
TAIL = r"[^\s\"'`<>|()\[\]{},;\\]*"


def is_text(place: str) -> bool:
    """Whether the file is text in which local paths are replaced."""
    name = Path(place).name
    return name.endswith(TEXTS) and (name in CONFIGS or not any(fnmatch(name, pattern) for pattern in KEPT))


def read_text(file: Path) -> str:
    """Return the text of a file that is published. Raises CheckpointError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8: {' '.join(str(error).split())}") from error


class Paths:
    """The paths that `texts` (name -> content) state, and what is published instead of each.

    instead: more of them, with what stands for them.
    """

    def __init__(self, folder: Path, texts: dict[str, str], instead: dict[str, str]):
        found = {str(folder.absolute()), str(folder.resolve())}
        for name, text in texts.items():
            if name.endswith(TOLD_BY):
                found |= {value for value in _strings(_parsed(name, text)) if _is_path(value)}
        known = {path: Path(path).name for path in found} | instead
        self._instead = dict[str, str]()
        for path, short in known.items():
            for write in (str, html.escape, lambda words: json.dumps(words)[1:-1]):
                self._instead[write(path)] = write(short)
        longest_first = sorted(self._instead, key=len, reverse=True)
        # A path with blanks may be folded over lines in YAML.
        words = "|".join(re.sub(r"(?:\\ )+", r"\\s+", re.escape(path)) for path in longest_first)
        self._paths = re.compile(rf"(?<![\w.-])(?:{words})(?![\w-])")
        roots = {str(Path.home()), str(folder.absolute().parent), str(folder.resolve().parent)} - {"/"}
        self._below = re.compile(rf"(?<![\w.-])(?:~|{'|'.join(map(re.escape, roots))})/{TAIL}")

    def without(self, text: str) -> str:
        """Return `text` with only the last part of each path."""
        text = self._paths.sub(self._short, text)
        return self._below.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], text)

    def _short(self, match: re.Match[str]) -> str:
        return self._instead.get(match[0]) or self._instead.get(" ".join(match[0].split())) or "path"


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _is_path(value: str) -> bool:
    """Whether a word is an absolute path, or a relative one that exists here; a bare name reveals nothing."""
    if "/" not in value.rstrip("/") or "\n" in value or len(value) > LONGEST:
        return False
    path = Path(value)
    if not path.name or path.name == "..":
        return False
    try:
        return len(path.parts) > 2 if path.is_absolute() or value.startswith("~/") else path.exists()
    except (OSError, ValueError):
        return False
