"""Reads a YAML file of settings as plain values, and the line of each key, so that messages can name it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mhconvert.errors import MhconvertError, RecipeError

from ..storage.bounded_yaml import PlainLoader
from ..storage.regular_file import require_regular

Keys = tuple[str, ...]  # from the outermost mapping inwards; an entry of a list by its number


@dataclass(frozen=True)
class Origins:
    """Where each value stands in a file, by its keys: "recipe.yaml, line 7"; () is the file itself. Else empty."""

    places: Mapping[Keys, str] = field(default_factory=dict)

    def fault(self, keys: Keys, message: str) -> RecipeError:
        """Return the error with the place of `keys` in front, or of the nearest enclosing mapping that has one."""
        inwards = (self.places.get(keys[:depth]) for depth in range(len(keys), -1, -1))
        place = next((found for found in inwards if found), None)
        return RecipeError(message if place is None else f"{place}: {message}")

    def blame(self, error: MhconvertError, keys: Keys, names: Mapping[str, Any]) -> MhconvertError:
        """Return the error with the line of the first of `names` that its message mentions, or of the mapping `keys`.

        A message that begins with the name begins with its whole key then. Where the values come from no file, return
        `error` itself.
        """
        if not self.places:
            return error
        message = str(error)
        spoken = next((word for word in re.findall(r"\w+", message) if word in names), None)
        if spoken is None:
            return self.fault(keys, message)
        begins = re.match(rf"{spoken}\b", message) is not None
        return self.fault((*keys, spoken), ".".join((*keys, message)) if begins else message)


NOWHERE = Origins()


@dataclass(frozen=True)
class Document:
    """The values of a YAML file, and where they stand."""

    values: dict[str, Any]
    origins: Origins


def read(path: Path) -> Document:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: With the line: the file cannot be read, is not a mapping, or gives a key twice.
    """
    try:
        require_regular(path, RecipeError)
        loader = PlainLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        places = dict(_places(node, path)) if isinstance(node, yaml.MappingNode) else {}
        values = loader.construct_document(node) if node is not None else None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read: it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise RecipeError(_reason(error, path)) from error
    except RecursionError as error:
        raise RecipeError(f"{path} cannot be read: it is nested too deeply") from error
    except ValueError as error:  # a date that there is not
        raise RecipeError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of settings")
    return Document(values, Origins({(): str(path)} | places))


def _places(root: yaml.MappingNode, path: Path) -> Iterator[tuple[Keys, str]]:
    """Yield the line of every key and list entry; of an alias, the line where its anchor is written."""
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
    """Raise RecipeError for a key that is given twice, of which YAML would silently take the last."""
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
