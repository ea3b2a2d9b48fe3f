"""Registers Hydra as a method of peft.

peft keeps its methods in a closed enum and has no plug-in mechanism, so the enum gets a member first; without one,
transformers' loaders fail on a type that has no `.value`.
"""

from __future__ import annotations

from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method

from mhconvert.errors import AdapterError

NAME = "HYDRA"


def register(config_class: Any, model_class: Any) -> None:
    """Make peft know Hydra by these classes in this process; may be called again.

    Raises:
        AdapterError: where peft has its own method of that name or prefix; the two cannot be told apart.
    """
    known_class = next((known for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind == NAME), None)
    if known_class is config_class:
        return
    taken = [
        str(kind) for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == model_class.prefix
    ]
    if known_class is not None or taken:
        other = f"{known_class.__module__}.{known_class.__name__}" if known_class is not None else taken[0]
        raise AdapterError(
            f"peft {peft.__version__} has a method of its own under the name of Hydra ({other}), so mhconvert's is "
            "not registered; use peft's, or for adapters that mhconvert wrote an older peft"
        )
    add_peft_type(NAME)
    register_peft_method(
        name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=model_class.prefix
    )


def add_peft_type(name: str) -> Any:
    """The member `name` of peft's enum of methods, added if missing; it is found by name, value and iteration."""
    kinds: Any = PeftType
    if name in kinds.__members__:
        return kinds[name]
    member: Any = str.__new__(kinds, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kinds
    member._sort_order_ = len(kinds._member_names_)
    kinds._member_map_[name] = member
    kinds._member_names_.append(name)
    kinds._value2member_map_[name] = member
    if hasattr(kinds, "_hashable_values_"):  # since CPython 3.12
        kinds._hashable_values_.append(name)
    type.__setattr__(kinds, name, member)  # EnumType's own forbids it
    return member
