"""Removes local paths from published texts: only the last component of each path stays."""

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
from ..convert.storage.auto_map import CONFIGS
from ..convert.storage.bounded_yaml import load_yaml

TEXTS = (".json", ".yaml", ".yml", ".md", ".html", ".svg", ".jsonl")
UNCHANGED = (*TEXT_FILES, "*.safetensors.index.json")  # tokens and tensor names may look like paths
PARSED = (".json", ".yaml", ".yml")  # files whose strings are searched for paths
MAX_PATH_LENGTH = 1024
PATH_REST = r"[^\s\"'`<>|()\[\]{},;\\]*"


def is_text(path: str) -> bool:
    """Whether `path` is a text file in which local paths are replaced."""
    name = Path(path).name
    return name.endswith(TEXTS) and (
        name in CONFIGS or not any(fnmatch(name, pattern) for pattern in UNCHANGED)
    )


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        CheckpointError: it cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8: {' '.join(str(error).split())}") from error


class LocalPaths:
    """The local paths in `texts` and what replaces each of them.

    Args:
        folder: the published folder; its own path is replaced too.
        texts: file name -> content.
        replacements: path -> replacement, for paths that are replaced by more than their last component.
    """

    def __init__(self, folder: Path, texts: dict[str, str], replacements: dict[str, str]):
        paths = {str(folder.absolute()), str(folder.resolve())}
        for name, text in texts.items():
            if name.endswith(PARSED):
                paths |= {value for value in _strings(_parse(name, text)) if _is_path(value)}
        short_names = {path: Path(path).name for path in paths} | replacements
        self._replacements = dict[str, str]()
        for path, short in short_names.items():
            for encode in (str, html.escape, lambda words: json.dumps(words)[1:-1]):
                self._replacements[encode(path)] = encode(short)
        longest_first = sorted(self._replacements, key=len, reverse=True)
        # YAML may fold a path with spaces over several lines.
        words = "|".join(re.sub(r"(?:\\ )+", r"\\s+", re.escape(path)) for path in longest_first)
        self._paths = re.compile(rf"(?<![\w.-])(?:{words})(?![\w-])")
        roots = {str(Path.home()), str(folder.absolute().parent), str(folder.resolve().parent)} - {"/"}
        self._below = re.compile(rf"(?<![\w.-])(?:~|{'|'.join(map(re.escape, roots))})/{PATH_REST}")

    def remove_from(self, text: str) -> str:
        """`text` with every local path replaced."""
        text = self._paths.sub(self._short, text)
        return self._below.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], text)

    def _short(self, match: re.Match[str]) -> str:
        """The replacement of a matched path, which YAML may have folded."""
        return (
            self._replacements.get(match[0]) or self._replacements.get(" ".join(match[0].split())) or "path"
        )


def _parse(name: str, text: str) -> Any:
    """The value of a JSON or YAML text; None if it is invalid."""
    try:
        return json.loads(text) if name.endswith(".json") else load_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def _strings(value: Any) -> Iterator[str]:
    """All strings in a nested value, keys included."""
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
    """Whether `value` is an absolute path or an existing relative one; a name without "/" is not a path."""
    if "/" not in value.rstrip("/") or "\n" in value or len(value) > MAX_PATH_LENGTH:
        return False
    path = Path(value)
    if not path.name or path.name == "..":
        return False
    try:
        return len(path.parts) > 2 if path.is_absolute() or value.startswith("~/") else path.exists()
    except (OSError, ValueError):
        return False
