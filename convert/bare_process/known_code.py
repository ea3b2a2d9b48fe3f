"""The one code that runs without --trust-remote-code: what a version of this package ships or has shipped."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from mhconvert.errors import UnsupportedError

from ..storage.auto_map import CONFIGS, classes
from ..storage.safetensors_reader import read_json

OWN_CLASS = re.compile(r"\w+(\.\w+)+")  # module.Class of a file in the folder: no path, no other repository


def may_run_code(folder: Path, trusted: bool) -> bool:
    """Whether an engine may run the code that the model folder names: the user trusts it, or mhconvert ships it.

    Raises UnsupportedError for other code; False where no code is named."""
    if trusted or "auto_map" not in read_json(folder / "config.json"):
        return trusted
    require_known_code(folder)
    return True


def require_known_code(folder: Path) -> None:
    """Raises UnsupportedError where loading `folder` with trust could run code that no version of this package ships,
    byte for byte: a Python file in it, code of another repository, or a link to a folder that may hold either."""
    way_out = "--trust-remote-code allows it"
    for name in CONFIGS:
        named = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        for value in classes(named):
            if not OWN_CLASS.fullmatch(value):
                raise UnsupportedError(
                    f"{folder / name} names code outside of its folder ({value}), and the check would run it; "
                    f"{way_out}"
                )
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            raise UnsupportedError(f"{path} is a link to a folder, which may hold code; {way_out}")
        if path.suffix == ".py" and not _is_released(path):
            raise UnsupportedError(
                f"{path} is code that no version of mhconvert up to this one ships, and the check would run it; "
                f"{way_out}"
            )


def _is_released(file: Path) -> bool:
    return file.is_file() and (hashlib.sha256(file.read_bytes()).hexdigest(), file.name) in released()


@cache
def released() -> frozenset[tuple[str, str]]:
    """(SHA-256, name) of each file of code that checkpoints of this and of earlier versions hold."""
    lines = (Path(__file__).parent / "released_code.sha256").read_text(encoding="ascii").splitlines()
    return frozenset((digest, name) for digest, name in map(str.split, lines))
