"""Selects the published files of a folder: files of known kinds that lie inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..convert.donor.hub_download import TOKENIZER_CODE
from ..convert.storage.safetensors_reader import read_json

PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "*.yaml", "*.yml"),
    *("*.html", "*.svg", "*.png", "metrics*.jsonl"),
    *("LICEN[SC]E*", "NOTICE*", "USE_POLICY*"),
    *TOKENIZER_CODE,
)
# Never published: hidden files, files of a run that has not ended, trainers' states, and pickles, which run code.
LEFT_OUT = (
    *(".*", "__pycache__", "*.partial", "*.new", "*.lock", "checkpoint-*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle"),
)
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
RELATIVE_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE
)
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a file's name in the cache of the Hub


def sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the published and the omitted files of `folder`, as paths relative to it."""
    code = _code(folder)
    sent, left_out = list[Path](), list[Path]()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        place = file.relative_to(folder)
        (sent if _is_published(folder, place, code) else left_out).append(place)
    return sent, left_out


def _is_published(folder: Path, place: Path, code: set[Path]) -> bool:
    known = place in code or any(fnmatch(place.name, pattern) for pattern in PUBLISHED)
    return known and not _is_withheld(place) and _lies_here(folder, folder / place)


def _is_withheld(place: Path) -> bool:
    return any(fnmatch(part, pattern) for part in place.parts for pattern in LEFT_OUT)


def _lies_here(folder: Path, file: Path) -> bool:
    """Whether the file's target lies in the folder, or is a blob of the Hub cache."""
    root, target = folder.resolve(), file.resolve()
    if not target.is_file():
        return False
    if target.is_relative_to(root):
        return not _is_withheld(target.relative_to(root))
    return target.parent.name == "blobs" and bool(BLOB.fullmatch(target.name))


def _code(folder: Path) -> set[Path]:
    """Return the modules that `auto_map` names, and those that they import from their folder."""
    found, ahead = set[Path](), list(_modules(folder))
    while ahead:
        place = ahead.pop()
        if place in found or not (folder / place).is_file():
            continue
        found.add(place)
        text = (folder / place).read_text(encoding="utf-8", errors="replace")
        for module, names in RELATIVE_IMPORT.findall(text):
            stems = [module.replace(".", "/")] if module else re.findall(r"\w+", names)
            ahead += [place.parent / f"{stem}.py" for stem in stems]
    return found


def _modules(folder: Path) -> Iterator[Path]:
    for name in CONFIGS:
        if (folder / name).is_file():
            stated: Any = read_json(folder / name).get("auto_map")
            values = stated.values() if isinstance(stated, dict) else [stated]
            for value in values:
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, str) and "--" not in item:  # else it is code of another repository
                        yield Path(item.rpartition(".")[0].replace(".", "/") + ".py")
