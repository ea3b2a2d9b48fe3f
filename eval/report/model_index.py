"""What `evaluation.json` says of the model in its folder: as `model-index` for the Hub, as a table for people."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mhconvert.errors import CheckpointError

from ...convert.checkpoint.provenance import EVALUATION
from ...convert.storage.folder_kind import ADAPTER_CONFIG, is_adapter
from ...convert.storage.safetensors_reader import read_json
from .units import count, number, share

TASK_TYPE = "text-generation"  # the Hub's name for what is evaluated
Row = tuple[str, str, str, str]


@dataclass
class Evaluation:
    """results: for `model-index`. rows: (quantity, base model, this model, remark). settings: how, in sentences."""

    results: list[EvalResult] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    def add(self, dataset: str, metric: str, name: str, value: Any, arguments: dict[str, Any]) -> None:
        """One figure for `model-index`; what is no finite number is left out."""
        if isinstance(value, (int, float)) and math.isfinite(value):
            self.results.append(
                EvalResult(
                    task_type=TASK_TYPE,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_args={key: item for key, item in arguments.items() if item is not None},
                    metric_type=metric,
                    metric_name=name,
                    metric_value=value,
                )
            )


@dataclass(frozen=True)
class Pair:
    """Where the figures of this model and of its donor are in every list of the file; donor: None where it has none."""

    this: int
    donor: int | None

    def of(self, figures: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(donor's, this model's)."""
        return (figures[self.donor] if self.donor is not None else {}), figures[self.this]


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in `folder`, of the model there; None without an `evaluation.json`.

    That model is the one with the fingerprint of the folder's files, of an adapter's together with its base model's.
    In a file without fingerprints it is the one whose reference resolves to the folder, else the last one; so too for
    an adapter whose base model can be had from neither this machine nor the file. A part that is missing has no
    figures.
    Raises CheckpointError for a file that cannot be read, and for one that measures other weights.
    """
    file = folder / EVALUATION
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        json.dumps(found, allow_nan=False)  # NaN is no JSON, and the Hub refuses it
        models = found.get("models") or []
        if not models:
            raise ValueError("it names no models")
        this = _own(models, folder)
        donor = next((n for n, model in enumerate(models) if model.get("role") == "donor"), None)
        pair = Pair(this, donor if donor != this else None)
        evaluation = Evaluation()
        for text in found.get("texts") or []:
            _add_text(evaluation, text, *pair.of(text["models"]))
        for task in found.get("tasks") or []:
            _add_task(evaluation, task, pair)
        if found.get("retrieval"):
            _add_retrieval(evaluation, found["retrieval"], *pair.of(found["retrieval"]["models"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not what mhconvert eval writes ({type(error).__name__}: {error}); "
            "run mhconvert eval again, or remove the file"
        ) from error
    return evaluation


def _own(models: list[dict[str, Any]], folder: Path) -> int:
    marks = [model.get("fingerprint") for model in models]
    mark = _mark(models, folder) if any(marks) else None
    if mark is not None:
        if mark not in marks:  # a healed copy of what was measured, or a file that has changed since
            raise CheckpointError(
                f"{folder / EVALUATION} measures other files than {folder} holds; run mhconvert eval, or remove it"
            )
        return len(marks) - 1 - marks[::-1].index(mark)
    own = [n for n, model in enumerate(models) if _is_folder(model.get("reference"), folder)]
    return own[-1] if own else len(models) - 1


def _mark(models: list[dict[str, Any]], folder: Path) -> str | None:
    """The fingerprint of what is in `folder`, as `fingerprint.of_model` has it; None where it cannot be had."""
    from ...convert.checkpoint import fingerprint

    if not is_adapter(folder):
        return fingerprint.of_folder(folder)
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    place = Path(base).expanduser()
    if base and place.exists():
        of_base = fingerprint.of_folder(place) if place.is_dir() else fingerprint.of_files([place])
    else:
        # A base model on the Hub is not asked for: if it was evaluated too, its fingerprint is in the file, and the
        # adapter itself is compared. Else nothing can be.
        stated = (m.get("fingerprint") for m in models if str(m.get("reference")).partition("@")[0] == base)
        of_base = next((str(found) for found in stated if found), "")
    own = fingerprint.of_folder(folder)
    return hashlib.sha256(f"{own} on {of_base}".encode()).hexdigest() if of_base else None


def _is_folder(reference: Any, folder: Path) -> bool:
    return bool(reference) and Path(str(reference)).expanduser().resolve() == folder.resolve()


def _add_text(
    evaluation: Evaluation, text: dict[str, Any], donor: dict[str, Any], this: dict[str, Any]
) -> None:
    name = Path(str(text["text"])).name
    arguments = {key: text.get(key) for key in ("sequences", "sequence_length", "tokens")}
    perplexity, of_donor = this.get("perplexity"), donor.get("perplexity")
    evaluation.add(name, "perplexity", "perplexity", perplexity, arguments)
    if perplexity is not None:
        times = f"× {perplexity / of_donor:.3f}" if of_donor else ""
        evaluation.rows.append((f"perplexity, {name}", number(of_donor), number(perplexity), times))
    if donor:
        evaluation.add(name, "kl", "KL from the base model, nats a token", this.get("kl"), arguments)
        agreement = this.get("top1_agreement")
        evaluation.add(name, "top1_agreement", "top-1 agreement with the base model", agreement, arguments)
        if this.get("kl") is not None:
            evaluation.rows.append(
                (f"KL from the base model, {name}", "0", number(this["kl"]), "nats a token")
            )
        if agreement is not None:
            evaluation.rows.append((f"top-1 agreement, {name}", "100 %", share(agreement), ""))
    if text.get("sequences"):
        rows = f"{count(text['sequences'])} rows of {count(text['sequence_length'])} tokens"
        evaluation.settings.append(f"{name}: {rows}.")


def _add_task(evaluation: Evaluation, task: dict[str, Any], pair: Pair) -> None:
    name = str(task["task"])
    arguments = {key: task.get(key) for key in ("version", "num_fewshot", "samples", "local")}
    for metric in task["metrics"]:
        donor, this = pair.of(metric["models"])
        label = str(metric["metric"])
        error = this.get("stderr")
        full = f"{label}, standard error {number(error)}" if error is not None else label
        evaluation.add(name, label, full, this.get("value"), arguments)
        if this.get("value") is not None:
            better = "↑" if metric.get("higher_is_better", True) else "↓"
            row = (f"{name}, {label} {better}", _with_error(donor), _with_error(this), _difference(this))
            evaluation.rows.append(row)
    asked = [f"{task['num_fewshot']}-shot"] if task.get("num_fewshot") is not None else []
    asked += [f"{count(task['samples'])} questions"] if task.get("samples") else []
    evaluation.settings += [f"{name}: {', '.join(asked)}."] if asked else []


def _add_retrieval(
    evaluation: Evaluation, found: dict[str, Any], donor: dict[str, Any], this: dict[str, Any]
) -> None:
    lengths = found["lengths"]
    arguments = {"lengths": lengths, "depths": found.get("depths")}
    evaluation.add("retrieval", "recall", "share recalled", this.get("share"), arguments)
    span = f"{count(min(lengths))} to {count(max(lengths))} tokens"
    row = (f"retrieval, {span}", share(donor.get("share")), share(this.get("share")), "of places, recalled")
    evaluation.rows.append(row)


def _with_error(figures: dict[str, Any]) -> str:
    value, error = figures.get("value"), figures.get("stderr")
    return number(value) + (f" ± {number(error)}" if value is not None and error is not None else "")


def _difference(this: dict[str, Any]) -> str:
    """+0.012 ± 0.008, within noise; empty where no difference was measured."""
    if this.get("difference") is None:
        return ""
    error = this.get("difference_stderr")
    spread = f" ± {number(error)}" if error is not None else ""
    return f"{this['difference']:+.4g}{spread}" + (", within noise" if this.get("within_noise") else "")
