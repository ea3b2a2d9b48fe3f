"""A subpackage and a public function that share a name: the module itself can be called."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    _function: tuple[str, str]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module, name = self._function
        return getattr(importlib.import_module(module), name)(*arguments, **options)


def make_callable(name: str, module: str) -> None:
    """Make the package `name` callable: a call is one of the function of its own last name in `module`."""
    package = sys.modules[name]
    package.__class__ = _CallableModule
    package.__dict__["_function"] = (module, name.rpartition(".")[2])
