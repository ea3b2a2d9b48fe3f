"""Selects the files of a folder that are published: files of known kinds whose targets are inside the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..convert.donor.hub_download import TOKENIZER_CODE
from ..convert.storage.auto_map import classes, is_elsewhere, module_file
from ..convert.storage.linked_files import is_inside
from ..convert.storage.safetensors_reader import read_json

PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "*.yaml", "*.yml"),
    *("*.html", "*.svg", "*.png", "metrics*.jsonl"),
    *("LICEN[SC]E*", "NOTICE*", "USE_POLICY*"),
    *TOKENIZER_CODE,
)
# Never published: hidden files, files of an unfinished run, training checkpoints, and pickles, which can run code.
LEFT_OUT = (
    *(".*", "__pycache__", "*.partial", "*.new", "*.lock", "checkpoint-*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle"),
)
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
RELATIVE_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE
)


def split_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(published, left out): the files of `folder`, as paths relative to it."""
    code = _remote_code(folder)
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


def _remote_code(folder: Path) -> set[Path]:
    """The modules in `auto_map` and those that they import relatively, as paths relative to `folder`."""
    modules, pending = set[Path](), list(_auto_map_modules(folder))
    while pending:
        path = pending.pop()
        if path in modules or not (folder / path).is_file():
            continue
        modules.add(path)
        text = (folder / path).read_text(encoding="utf-8", errors="replace")
        for module, names in RELATIVE_IMPORT.findall(text):
            stems = [module.replace(".", "/")] if module else re.findall(r"\w+", names)
            pending += [path.parent / f"{stem}.py" for stem in stems]
    return modules


def _auto_map_modules(folder: Path) -> Iterator[Path]:
    """The modules in `auto_map` of every config, without those of other repositories."""
    for name in CONFIGS:
        if (folder / name).is_file():
            named = classes(read_json(folder / name).get("auto_map"))
            yield from (module_file(each) for each in named if not is_elsewhere(each))
