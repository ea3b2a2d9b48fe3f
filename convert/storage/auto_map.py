"""`auto_map`, by which a config points to Python code: {"AutoModel": "module.Class"}, a list of such, or nulls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .safetensors_reader import read_json

OF_TOKENIZER = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
CONFIGS = ("config.json", *OF_TOKENIZER)
RELATIVE_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+\.([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE
)


def classes(auto_map: Any) -> Iterator[str]:
    """Every class that an `auto_map`, or an entry of one, names."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict | list):
        for item in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from classes(item)


def is_elsewhere(name: str) -> bool:
    """Whether a class is another repository's: "org/name--module.Class"."""
    return "--" in name


def module_file(name: str) -> Path:
    """The file of a class, relative to the folder of the config that names it."""
    return Path(name.rpartition(".")[0].replace(".", "/") + ".py")


def modules(folder: Path, configs: Iterable[str] = CONFIGS) -> set[Path]:
    """The modules in `folder` that `auto_map` of the configs names, and those that they import relatively, as paths
    relative to it."""
    found, pending = set[Path](), list(_named_modules(folder, configs))
    while pending:
        path = pending.pop()
        if path in found or path.is_absolute() or not (folder / path).is_file():
            continue
        found.add(path)
        text = (folder / path).read_text(encoding="utf-8", errors="replace")
        for module, names in RELATIVE_IMPORT.findall(text):
            stems = [module.replace(".", "/")] if module else re.findall(r"\w+", names)
            pending += [path.parent / f"{stem}.py" for stem in stems]
    return found


def _named_modules(folder: Path, configs: Iterable[str]) -> Iterator[Path]:
    """The modules in `auto_map` of the configs, without those of other repositories."""
    for name in configs:
        if (folder / name).is_file():
            named = classes(read_json(folder / name).get("auto_map"))
            yield from (module_file(each) for each in named if not is_elsewhere(each))
