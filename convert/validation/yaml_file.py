"""A YAML file of settings as values, and where each of them stands, so that a fault can say its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mhconvert.errors import MhconvertError, RecipeError

Keys = tuple[str, ...]  # from the outermost mapping inwards; an entry of a list by its number


@dataclass(frozen=True)
class Origins:
    """Where values come from, by their keys: "recipe.yaml, line 7"; () is the whole. Empty: from no file."""

    places: Mapping[Keys, str] = field(default_factory=dict)

    def fault(self, keys: Keys, message: str) -> RecipeError:
        """The error with the place of `keys` before it, or of the nearest mapping around them that has one."""
        inwards = (self.places.get(keys[:depth]) for depth in range(len(keys), -1, -1))
        place = next((found for found in inwards if found), None)
        return RecipeError(message if place is None else f"{place}: {message}")

    def blame(self, error: MhconvertError, keys: Keys, names: Mapping[str, Any]) -> MhconvertError:
        """The fault of the mapping at `keys`, at the line of the first of its `names` that the message speaks of.

        `error` itself where nothing has come from a file.
        """
        if not self.places:
            return error
        spoken = next((word for word in re.findall(r"\w+", str(error)) if word in names), None)
        return self.fault(keys if spoken is None else (*keys, spoken), str(error))


NOWHERE = Origins()


@dataclass(frozen=True)
class Document:
    """A mapping of settings as plain values, and their origins."""

    values: dict[str, Any]
    origins: Origins


def read(path: Path) -> Document:
    """The mapping in a YAML file. Raises RecipeError, with the line, for what is none, and for a key given twice."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        places = dict(_places(node, path)) if isinstance(node, yaml.MappingNode) else {}
        values = loader.construct_document(node) if node is not None else None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read: it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise RecipeError(_reason(error, path)) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a date that there is not
        raise RecipeError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of settings")
    return Document(values, Origins({(): str(path)} | places))


def _places(root: yaml.MappingNode, path: Path) -> Iterator[tuple[Keys, str]]:
    """The line of every key and entry. What an alias repeats is looked at once, where it is written."""
    waiting: list[tuple[Keys, yaml.Node]] = [((), root)]
    seen = set()
    while waiting:
        keys, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            inner = [(str(index), entry, entry) for index, entry in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            inner = [(str(key.value), key, value) for key, value in node.value]
            _require_single(keys, [(name, key) for name, key, _ in inner], path)
        else:
            continue
        for name, at, value in inner:
            yield (*keys, name), _line(path, at.start_mark)
            waiting.append(((*keys, name), value))


def _require_single(keys: Keys, names: list[tuple[str, yaml.Node]], path: Path) -> None:
    """YAML would take the last of two silently."""
    first: dict[str, yaml.Node] = {}
    for name, key in names:
        if name in first:
            dotted = ".".join((*keys, name))
            earlier = first[name].start_mark.line + 1
            raise RecipeError(
                f"{_line(path, key.start_mark)}: {dotted} is given twice, first in line {earlier}"
            )
        first[name] = key


def _line(path: Path, mark: Any) -> str:
    return f"{path}, line {mark.line + 1}"


def _reason(error: yaml.YAMLError, path: Path) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "'\\t'" in problem:
        problem += " (indent with spaces)"
    return f"{path if mark is None else _line(path, mark)} cannot be read: {problem}"
