"""A limit to the time that an adapter's expressions take: some backtrack for years over one name of a module.

peft itself matches them, with Python's `re`, which knows no limit, and rules about nested repetitions would refuse good
ones and miss bad ones. So a child process first matches all of them, as peft does, to all names that peft will match
them to; what it did in time takes no longer afterwards.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mhconvert.errors import AdapterError

from ..storage.folder_kind import ADAPTER_CONFIG
from ..validation.field_types import SHOWN

SECONDS = 10.0  # all expressions of a large mixture of experts take a tenth of one
CHILD = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for number, (how, expression) in enumerate(expressions):
    print(number, flush=True)
    matches = getattr(re.compile(expression), how)
    for name in names:
        matches(name)
"""
PLAIN = re.compile(r"[\w.]*")  # a name, which needs no child


def require_quick(config: Any, folder: Path, names: Iterable[str]) -> None:
    """Raises AdapterError for an expression of an adapter that peft cannot use, or not in time.

    Args:
        config: of peft.
        folder: of the adapter, for messages.
        names: of the modules of its base model.
    """
    found = [entry for entry in _expressions(config, folder) if not PLAIN.fullmatch(entry[1])]
    if not found:
        return
    asked = json.dumps([[(how, wrapped) for _, _, how, wrapped in found], list(names)])
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        child = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        field, pattern = found[_last(error.stdout)][:2]
        raise AdapterError(
            f"{folder / ADAPTER_CONFIG}: {field} '{pattern[:SHOWN]}' takes longer than {SECONDS:g} s to match "
            "the names of the base model's modules; write it without repetitions inside of repetitions"
        ) from error
    if child.returncode != 0:
        field, pattern = found[_last(child.stdout)][:2]
        reason = " ".join(child.stderr.strip().splitlines()[-1:])
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: {field} '{pattern[:SHOWN]}' cannot be used: {reason}")


def _expressions(config: Any, folder: Path) -> list[tuple[str, str, str, str]]:
    """(field, pattern, method of `re`, expression) of everything that peft matches to names, in peft's own forms."""
    found = []
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if not isinstance(pattern, str | list | set | tuple | None):
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: {field}={pattern!r} is neither a name nor a list of names"
            )
        if isinstance(pattern, str):
            found.append((field, pattern, "fullmatch", pattern))
    for field, form in (
        ("rank_pattern", r"(.*\.)?({})$"),
        ("alpha_pattern", r"(.*\.)?({})$"),
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
    ):
        patterns = getattr(config, field, None) or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list | set | tuple | dict) or not all(
            isinstance(each, str) for each in patterns
        ):
            raise AdapterError(
                f"{folder / ADAPTER_CONFIG}: {field}={patterns!r} is neither a name nor a list of names"
            )
        found += [(field, pattern, "match", form.replace("{}", pattern)) for pattern in patterns]
    return found


def _last(printed: str | bytes | None) -> int:
    """The last number that the child has printed: of the expression that it was at."""
    text = printed.decode() if isinstance(printed, bytes) else printed or ""
    return int((text.split() or ["0"])[-1])
