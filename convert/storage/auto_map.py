"""`auto_map`, by which a config points to Python code: {"AutoModel": "module.Class"}, a list of such, or nulls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
