"""Writing `evaluation.json` into a checkpoint's folder; `mhconvert push` adds its results to the model card."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError, OutputError

from ...convert.checkpoint.provenance import EVALUATION
from ...convert.storage.output_folder import PARTIAL
from ...convert.storage.safetensors_reader import read_json
from ..tasks import scores
from ..text_spread import over_texts
from ..writing.greedy_texts import without_texts
from .conversion_tables import json_safe

HOW = (
    ("texts", "text", "sequences", "sequence_length"),
    ("tasks", "task", "num_fewshot"),
)  # of rows, what they are
ASKED = ("retrieval", "generation", "refusals")  # parts that depend on what the models are asked
COMPARED = ("models", "settings", "versions")  # parts in which two results of one table agree


def record_evaluation(result: dict[str, Any]) -> dict[str, list[str]]:
    """Write `result` as `evaluation.json` into the local folder of every model except the donor.

    It has none of the prompts and texts of generation, which may be private. What the file has of the same models in
    the same settings, and `result` has not, is kept in it. Figures that cannot stand in one file with `result` are kept
    beside it, as `evaluation-1.json` and so on.

    Returns:
        kept_aside: the files of these; {} where there are none.

    Raises:
        OutputError: a file cannot be written.
    """
    aside = []
    result = result | {"generation": without_texts(result.get("generation"))}
    for model in result["models"]:
        folder = Path(model["reference"])
        if model["role"] == "donor" or not folder.is_dir():
            continue
        file, unfinished = folder / EVALUATION, folder / f"{EVALUATION}{PARTIAL}"
        earlier = _earlier(file)
        whole = json_safe(_merged(earlier, result))
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            unfinished.write_text(text, encoding="utf-8")
            if _loses(earlier, whole):
                aside.append(_kept_aside(file))
            os.replace(unfinished, file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    return {"kept_aside": list(map(str, aside))} if aside else {}


def _earlier(file: Path) -> dict[str, Any]:
    """What an earlier evaluation recorded; {} for a file that is not there or is damaged."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def _merged(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the texts, tasks and probes of `earlier` that it lacks, where both can stand in one table."""
    try:
        if any(_comparable(earlier, name) != _comparable(result, name) for name in COMPARED):
            return result
        return _together(earlier, result)
    except (KeyError, TypeError, AttributeError):  # a record of another version, or edited
        return result


def _loses(earlier: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether `whole` lacks figures of `earlier`, other than those of the same models in the same settings."""
    try:
        if not any(earlier.get(name) for name in ("texts", "tasks", "retrieval", "generation", "refusals")):
            return False
        if any(_comparable(earlier, name) != _comparable(whole, name) for name in COMPARED):
            return True
        if any(earlier.get(name) and _asked(earlier[name]) != _asked(whole[name]) for name in ASKED):
            return True
        return any(_measured(earlier, *each) - _measured(whole, *each) for each in HOW)
    except (KeyError, TypeError, AttributeError):  # a record of another version, or edited
        return bool(earlier)


def _measured(result: dict[str, Any], part: str, *fields: str) -> set[tuple[Any, ...]]:
    """What each row of a part measures: the text, or each metric of the task, and how."""
    return {
        (*(row[name] for name in fields), metric.get("metric"))
        for row in result.get(part) or []
        for metric in row.get("metrics") or [{}]
    }


def _asked(part: dict[str, Any]) -> dict[str, Any]:
    """What the models were asked, and how: all of the part but its figures, and lengths that none of them reads."""
    return {key: value for key, value in part.items() if key not in ("models", "left_out")}


def _kept_aside(file: Path) -> Path:
    """A copy of `file` under the first free name of evaluation-1.json, evaluation-2.json, and so on."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
    place = next(name for name in names if not os.path.lexists(name))
    shutil.copyfile(file, place)
    return place


def _together(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: [row for row in earlier.get(name) or [] if row[key] not in {new[key] for new in result[name]}]
        for name, key in (("texts", "text"), ("tasks", "task"))
    }
    kinds = {text["kind"] for text in result["texts"] if "kind" in text}
    kept["texts"] = [text for text in kept["texts"] if text.get("kind") not in kinds]
    rows, texts = [*kept["tasks"], *result["tasks"]], [*kept["texts"], *result["texts"]]
    return result | {
        "texts": texts,
        "over_texts": over_texts(texts),
        "tasks": rows,
        "average": scores.average(rows),
        "apart": scores.apart(rows),
        "cache": result["cache"] or earlier.get("cache"),
        "versions": earlier["versions"] | result["versions"],
        "retrieval": result["retrieval"] or earlier.get("retrieval"),
        "generation": result.get("generation") or earlier.get("generation"),
        "refusals": result.get("refusals") or earlier.get("refusals"),
    }


def _comparable(result: dict[str, Any], name: str) -> Any:
    """The part of a result in which two must agree: not what chooses the tasks, and what is only speed."""
    values = json.loads(json.dumps(result.get(name)))
    if name == "models":
        keys = ("fingerprint", "dtype", "kv_cache_dtype")
        return [[*(model[key] for key in keys), model.get("long_context")] for model in values or []]
    return {
        key: value for key, value in (values or {}).items() if key not in ("suite", "batch_size", "lm_eval")
    }
