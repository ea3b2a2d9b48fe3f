"""What a run's survey found of every layer, in the run's work folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..methods.budget_division import LayerNeed
from ..storage.atomic_files import write_json
from .stored_sensitivities import MomentFiles, Sensitivities

NEEDS, SENSITIVITIES = "needs.json", "sensitivities"  # numbers in a file, or tensors in a folder
FILES = (NEEDS, SENSITIVITIES)

Needs = list[LayerNeed] | Sensitivities
Survey = Callable[[Path], Needs]  # is given a new folder for files of its own


def made_once(work: Path, survey: Survey) -> Needs:
    """What is in the folder `work`, or else what `survey` finds, which then is there."""
    path, folder = (work / name for name in FILES)
    if not (path.is_file() or folder.is_dir()):
        unfinished = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted run
        surveyed = survey(unfinished)
        if isinstance(surveyed, Sensitivities):
            os.replace(unfinished, folder)
        else:
            write_json(path, [dataclasses.asdict(need) for need in surveyed])
    if path.is_file():
        return [LayerNeed(**need) for need in json.loads(path.read_text())]
    return Sensitivities(MomentFiles(folder))
