"""A subpackage and a public function that share a name: the module itself can be called."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mhconvert import api

        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(name: str) -> None:
    """A call of the module `name` is from now on one of the function in `mhconvert.api` that is called like it."""
    sys.modules[name].__class__ = _CallableModule
