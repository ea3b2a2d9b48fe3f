"""Writing `evaluation.json` into a checkpoint's folder; `mhconvert push` adds its results to the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mhconvert.errors import OutputError

from ...convert.checkpoint.provenance import EVALUATION
from .conversion_tables import json_safe


def record_evaluation(result: dict[str, Any]) -> list[Path]:
    """Write `result` as `evaluation.json` into the local folder of every model except the donor.

    Returns the written files.

    Raises:
        OutputError: a file cannot be written.
    """
    text = json.dumps(json_safe(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    written = []
    for model in result["models"]:
        folder = Path(model["reference"])
        if model["role"] == "donor" or not folder.is_dir():
            continue
        file, unfinished = folder / EVALUATION, folder / f"{EVALUATION}.partial"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
        written.append(file)
    return written
