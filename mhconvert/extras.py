"""Libraries that `pip install mhconvert` leaves out, and the extra that brings each."""

from __future__ import annotations

import importlib.util

from mhconvert.errors import MhconvertError

EXTRAS = {
    "lm_eval": "eval",
    "datasets": "eval",
    "pyarrow": "eval",  # datasets brings it
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
}


def is_installed(library: str) -> bool:
    """Whether `library`, a key of EXTRAS, is there."""
    return importlib.util.find_spec(library) is not None


def install(library: str) -> str:
    """The command that installs `library`, a key of EXTRAS."""
    return f"pip install 'mhconvert[{EXTRAS[library]}]'"


def require(library: str, what: str, instead: str, fault: type[MhconvertError] = MhconvertError) -> None:
    """Raises `fault` where `library`, a key of EXTRAS, is not installed.

    Args:
        what: what needs it.
        instead: what does without it, a clause.
    """
    if not is_installed(library):
        raise fault(f"{what} needs {library.replace('_', '-')}: {install(library)}; {instead}")
