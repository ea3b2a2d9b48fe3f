"""The files beside weights and config that a result takes over: tokenizer, chat templates, processor, licence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..storage.atomic_files import write_json
from ..storage.auto_map import OF_TOKENIZER, classes, is_elsewhere, module_file, modules
from ..storage.linked_files import require_own
from ..storage.safetensors_reader import read_json
from .hub_download import CARRIED_FILES


def carry_files(source: Path, target: Path, *patterns: str, code: bool = False) -> None:
    """Copy the files that match, byte for byte but for `auto_map` entries whose code does not come along.

    Args:
        source: the folder to copy from.
        target: the folder to copy into.
        patterns: relative to `source`; by default CARRIED_FILES.
        code: copy the code too that the configs of tokenizer and processor name.

    Raises:
        CheckpointError: one of them is a link out of `source`; see `require_own`.
    """
    files = carried(source, *patterns, code=code)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
    for file in (file for file in files if file.name.endswith("_config.json")):
        _drop_code(target / file, code)


def carried(source: Path, *patterns: str, code: bool = False) -> list[Path]:
    """What `carry_files` copies, relative to `source`. Raises as it does."""
    matches = (file for pattern in patterns or CARRIED_FILES for file in source.glob(pattern))
    files = {file.relative_to(source) for file in matches if file.is_file()}
    files |= modules(source, OF_TOKENIZER) if code else set()
    for file in sorted(files):
        require_own(source, source / file)
    return sorted(files)


def _drop_code(file: Path, code: bool) -> None:
    """Remove from a JSON file the entries of `auto_map` whose code is not beside it.

    With `code` the entries for code of another repository ("org/name--module.Class") stay.
    """
    settings = read_json(file)
    if "auto_map" not in settings:
        return
    auto_map = settings.pop("auto_map")
    named = auto_map if isinstance(auto_map, dict) else {"AutoTokenizer": auto_map}  # an old form
    kept = {auto: value for auto, value in named.items() if _there(value, file.parent, code)}
    if kept == auto_map:
        return
    write_json(file, settings | ({"auto_map": kept} if kept else {}))


def _there(value: Any, folder: Path, code: bool) -> bool:
    """Whether the code of an `auto_map` entry (a class or a list of classes and nulls) may be loaded from `folder`."""
    return code and all(
        is_elsewhere(name) or (folder / module_file(name)).is_file() for name in classes(value)
    )
