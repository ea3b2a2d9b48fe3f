"""Selects the files of a folder that are published: files of known kinds whose targets are inside the folder."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from ..convert.storage.auto_map import modules
from ..convert.storage.linked_files import is_inside
from ..convert.storage.output_folder import PARTIAL

PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "*.yaml", "*.yml"),
    *("*.model", "*.model.*", "*.tiktoken"),
    *("*.html", "*.svg", "*.png", "metrics*.jsonl"),
    *("LICEN[SC]E*", "NOTICE*", "USE_POLICY*"),
)
# Never published: hidden files, files of an unfinished run, training checkpoints, figures that were kept aside, and
# pickles, which can run code.
LEFT_OUT = (
    *(".*", "__pycache__", f"*{PARTIAL}", "*.new", "*.lock", "checkpoint-*", "evaluation-*.json"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle"),
)


def split_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(published, left out): the files of `folder`, as paths relative to it."""
    code = modules(folder)
    published, left_out = list[Path](), list[Path]()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        path = file.relative_to(folder)
        (published if _is_published(folder, path, code) else left_out).append(path)
    return published, left_out


def _is_published(folder: Path, path: Path, code: set[Path]) -> bool:
    known = path in code or any(fnmatch(path.name, pattern) for pattern in PUBLISHED)
    return known and not _is_withheld(path) and _is_inside(folder, folder / path)


def _is_withheld(path: Path) -> bool:
    return any(fnmatch(part, pattern) for part in path.parts for pattern in LEFT_OUT)


def _is_inside(folder: Path, file: Path) -> bool:
    """Whether the file's target is a publishable file in the folder, or a blob of the Hub's local cache."""
    root, target = folder.resolve(), file.resolve()
    withheld = target.is_relative_to(root) and _is_withheld(target.relative_to(root))
    return is_inside(folder, file) and not withheld
