"""YAML of others, whose aliases must not unfold to more than was written: nine lines can stand for a billion values."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import yaml

from .unicode_text import lone_surrogate

UNFOLDED = 10_000  # values that aliases may add to those that are written


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader that raises YAMLError for more aliases, or for an alias inside of what it stands for."""

    def get_single_node(self) -> yaml.Node | None:
        """The root of the document, before any value is made of it."""
        root = super().get_single_node()
        sizes: dict[int, float] = {}
        if root is not None and _unfolded(root, sizes) > len(sizes) + UNFOLDED:
            raise yaml.YAMLError("its aliases unfold to too many values; write them out")
        return root

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        """The next scalar, pairs of escapes as JSON has them joined. Raises MarkedYAMLError for half of a pair."""
        node = super().compose_scalar_node(anchor)
        node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        fault = lone_surrogate(node.value)
        if fault is not None:
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        return node


class PlainLoader(BoundedLoader):
    """YAML without binary values and sets too, which no setting has."""

    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag not in ("tag:yaml.org,2002:binary", "tag:yaml.org,2002:set")
    }


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError for text that is none, or is nested too deeply."""
    try:
        return yaml.load(text, BoundedLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:  # a date that there is not
        raise yaml.YAMLError(str(error)) from error


def _unfolded(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many nodes there are from `node` on with every alias written out; infinite where one contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes) for part in parts)
    return sizes[id(node)]
