"""The conversion pass and the methods. Open `pipeline.py` first.

The subpackage and the function `mhconvert.convert(recipe)` share a name, so the module itself can be called;
the call goes to `mhconvert.api.convert`, which composes the pass with healing and evaluation.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mhconvert import api

        return api.convert(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
