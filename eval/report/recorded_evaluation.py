"""Writing `evaluation.json` into a checkpoint's folder; `mhconvert push` adds its results to the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError, OutputError

from ...convert.checkpoint.provenance import EVALUATION
from ...convert.storage.safetensors_reader import read_json
from ..tasks import scores
from .conversion_tables import json_safe

COMPARED = ("models", "settings", "versions")  # parts in which two results of one table agree


def record_evaluation(result: dict[str, Any]) -> list[Path]:
    """Write `result` as `evaluation.json` into the local folder of every model except the donor.

    What the file has of the same models in the same settings, and `result` has not, is kept.

    Returns the written files.

    Raises:
        OutputError: a file cannot be written.
    """
    written = []
    for model in result["models"]:
        folder = Path(model["reference"])
        if model["role"] == "donor" or not folder.is_dir():
            continue
        file, unfinished = folder / EVALUATION, folder / f"{EVALUATION}.partial"
        whole = json_safe(_merged(_earlier(file), result))
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
        written.append(file)
    return written


def _earlier(file: Path) -> dict[str, Any]:
    """What an earlier evaluation recorded; {} for a file that is not there or is damaged."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def _merged(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the texts, tasks and retrieval of `earlier` that it lacks, where both can stand in one table."""
    try:
        if any(_comparable(earlier, name) != _comparable(result, name) for name in COMPARED):
            return result
        return _together(earlier, result)
    except (KeyError, TypeError, AttributeError):  # a record of another version, or edited
        return result


def _together(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: [row for row in earlier.get(name) or [] if row[key] not in {new[key] for new in result[name]}]
        for name, key in (("texts", "text"), ("tasks", "task"))
    }
    rows = [*kept["tasks"], *result["tasks"]]
    return result | {
        "texts": [*kept["texts"], *result["texts"]],
        "tasks": rows,
        "average": scores.average(rows) if rows else None,
        "cache": result["cache"] or earlier.get("cache"),
        "versions": earlier["versions"] | result["versions"],
        "retrieval": result["retrieval"] or earlier.get("retrieval"),
    }


def _comparable(result: dict[str, Any], name: str) -> Any:
    """The part of a result in which two must agree: not what chooses the tasks, and what is only speed."""
    values = json.loads(json.dumps(result.get(name)))
    if name == "models":
        return [[model[key] for key in ("fingerprint", "dtype", "kv_cache_dtype")] for model in values or []]
    return {
        key: value for key, value in (values or {}).items() if key not in ("suite", "batch_size", "lm_eval")
    }
