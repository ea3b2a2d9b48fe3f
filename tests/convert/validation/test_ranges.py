"""Every numeric setting has a range where it is declared, or a parser that asks for one."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from mhconvert.convert.methods.registry import METHOD_NAMES, settings_class
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.convert.validation.check import check
from mhconvert.convert.validation.option import declared
from mhconvert.eval.settings import EvalSettings
from mhconvert.run.stage_settings import ExportStage, PushStage

CLASSES = (
    Recipe,
    Calibration,
    HealSettings,
    EvalSettings,
    ExportStage,
    PushStage,
    *map(settings_class, METHOD_NAMES),
)
NUMERIC = [
    pytest.param(kind, name, field, id=f"{kind.__name__}.{name}")
    for kind in CLASSES
    for name, field in declared(kind).items()
    if {int, float} & {field.hint, *get_args(field.hint)}
]


@pytest.mark.parametrize(("kind", "name", "field"), NUMERIC)
def test_a_number_has_a_range(kind: Any, name: str, field: Any) -> None:
    bounds = field.option.bounds
    assert {"gt", "ge"} & bounds.keys() or field.option.parse is not None
    numbers = [
        -1e31,
        math.nan,
        -math.inf,
        *([] if int in (field.hint, *get_args(field.hint)) else [math.inf, 1e31]),
    ]
    for number in numbers if bounds else ():
        _, faults = check(kind, {name: number}, finite=False)
        assert [fault.field for fault in faults] == [name], number


def test_there_are_numbers_of_every_class_that_has_them() -> None:
    assert len(NUMERIC) > 25
