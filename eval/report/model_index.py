"""The results in `evaluation.json` for the model in its folder: `model-index` metadata and the rows of a table."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mhconvert.errors import CheckpointError

from ...convert.calibration.text_files import told_apart
from ...convert.checkpoint.provenance import EVALUATION
from ...convert.storage.safetensors_reader import read_json
from .. import refusal_counts, text_spread
from ..settings import OWN_CACHE
from ..writing.verdict import sentence
from .evaluated_model import Pair, pair_for
from .task_notes import notes
from .units import count, number, share

TASK_TYPE = "text-generation"  # the Hub's name of the evaluated task
Row = tuple[str, str, str, str]


@dataclass
class Evaluation:
    """The results of one model.

    Attributes:
        results: entries of `model-index`.
        rows: (quantity, base model, this model, remark).
        settings: sentences on how the results were measured.
        conditions: of all results, beside each one's own arguments.
    """

    results: list[EvalResult] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    def add(self, dataset: str, metric: str, name: str, value: Any, arguments: dict[str, Any]) -> None:
        """Add a value to `results`; one that is not a finite number is left out."""
        arguments = arguments | self.conditions
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


def read_evaluation(folder: Path) -> Evaluation | None:
    """The results for the model in `folder`; None if the folder has no `evaluation.json`.

    Raises CheckpointError where the file cannot be read, or measures other weights.
    """
    file = folder / EVALUATION
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        json.dumps(content, allow_nan=False)  # the Hub refuses NaN, which is not valid JSON
        models = content.get("models") or []
        if not models:
            raise ValueError("it names no models")
        pair, evaluation = pair_for(models, folder), Evaluation()
        _add_cache(evaluation, models[pair.this])
        texts = content.get("texts") or []
        for name, text in zip(told_apart([text["text"] for text in texts]), texts, strict=True):
            _add_text(evaluation, name, text, *pair.select(text["models"]))
        if content.get("over_texts") and pair.donor is not None:
            _add_over_texts(evaluation, content, pair)
        for task in content.get("tasks") or []:
            _add_task(evaluation, task, pair)
        _add_means(evaluation, content, pair)
        evaluation.settings += notes(content)
        if content.get("retrieval"):
            _add_retrieval(evaluation, content["retrieval"], *pair.select(content["retrieval"]["models"]))
        if content.get("generation"):
            _add_generation(evaluation, content["generation"], pair)
        if content.get("refusals"):
            _add_refusals(evaluation, content["refusals"], *pair.select(content["refusals"]["models"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not what mhconvert eval writes ({type(error).__name__}: {error}); "
            "run mhconvert eval again, or remove the file"
        ) from error
    return evaluation


def _add_cache(evaluation: Evaluation, model: dict[str, Any]) -> None:
    """Say it where the model was measured with another KV cache than its own, or with --long-context."""
    if reading := model.get("long_context"):
        evaluation.conditions["long_context"] = reading
        evaluation.settings.append(
            f"This model read texts beyond its trained length with --long-context {reading}."
        )
    dtype = model.get("kv_cache_dtype", OWN_CACHE)
    if dtype != OWN_CACHE:
        evaluation.conditions["kv_cache_dtype"] = dtype
        evaluation.settings.append(f"This model was measured with a KV cache of dtype {dtype}.")


def _add_text(
    evaluation: Evaluation, name: str, text: dict[str, Any], donor: dict[str, Any], this: dict[str, Any]
) -> None:
    """Add the perplexity, KL and top-1 agreement on one text, under its `name`."""
    arguments = {key: text.get(key) for key in ("sequences", "sequence_length", "tokens")}
    perplexity, donor_perplexity = this.get("perplexity"), donor.get("perplexity")
    evaluation.add(name, "perplexity", "perplexity", perplexity, arguments)
    if perplexity is not None:
        ratio = f"× {perplexity / donor_perplexity:.3f}" if donor_perplexity else ""
        evaluation.rows.append((f"perplexity, {name}", number(donor_perplexity), number(perplexity), ratio))
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


def _add_over_texts(evaluation: Evaluation, content: dict[str, Any], pair: Pair) -> None:
    """Add the mean of the texts and the worst, and say which are much worse than the others."""
    _, this = pair.select(content["over_texts"])
    for label, ratio in (
        (f"mean of {len(text_spread.counted(content['texts']))} texts", this["ratio"]),
        (f"worst text, {this['worst']}", this["worst_ratio"]),
    ):
        times = "not finite" if ratio is None else f"× {ratio:.3f}"
        evaluation.rows.append((f"perplexity, {label}", "", "", times))
    if worse := text_spread.sentence(this):
        evaluation.settings.append(f"{worse[0].upper()}{worse[1:]}.")


def _add_task(evaluation: Evaluation, task: dict[str, Any], pair: Pair) -> None:
    """Add every metric of one task."""
    name = str(task["task"])
    arguments = {key: task.get(key) for key in ("version", "num_fewshot", "samples", "local")}
    for metric in task["metrics"]:
        donor, this = pair.select(metric["models"])
        label = str(metric["metric"])
        error = this.get("stderr")
        metric_name = f"{label}, standard error {number(error)}" if error is not None else label
        evaluation.add(name, label, metric_name, this.get("value"), arguments)
        if this.get("value") is not None:
            arrow = "↑" if metric.get("higher_is_better", True) else "↓"
            row = (f"{name}, {label} {arrow}", _with_error(donor), _with_error(this), _difference(this))
            evaluation.rows.append(row)
    settings = [f"{task['num_fewshot']}-shot"] if task.get("num_fewshot") is not None else []
    settings += [f"{count(task['samples'])} questions"] if task.get("samples") else []
    evaluation.settings += [f"{name}: {', '.join(settings)}."] if settings else []


def _add_means(evaluation: Evaluation, content: dict[str, Any], pair: Pair) -> None:
    """Add the mean over tasks, and those of MMLU and of each language, which are not in it."""
    means = [*([content["average"]] if content.get("average") else []), *(content.get("apart") or ())]
    for mean in means:
        donor, this = pair.select(mean["models"])
        label = f"{mean['name']}, apart: mean" if "name" in mean else "mean"
        number = f"{count(len(mean['tasks']))} task{'s' * (len(mean['tasks']) != 1)}"
        row = (f"{label} of {number}", _with_error(donor), _with_error(this), _difference(this))
        evaluation.rows.append(row)


def _add_retrieval(
    evaluation: Evaluation, retrieval: dict[str, Any], donor: dict[str, Any], this: dict[str, Any]
) -> None:
    """Add the share of numbers that were recalled from long text."""
    lengths = retrieval["lengths"]
    arguments = {"lengths": lengths, "depths": retrieval.get("depths")}
    evaluation.add("retrieval", "recall", "share recalled", this.get("share"), arguments)
    span = f"{count(min(lengths))} to {count(max(lengths))} tokens"
    row = (f"retrieval, {span}", share(donor.get("share")), share(this.get("share")), "of places, recalled")
    evaluation.rows.append(row)


def _add_generation(evaluation: Evaluation, generation: dict[str, Any], pair: Pair) -> None:
    """Add the verdict on what the model writes, and the figures of its sampled texts."""
    donor, this = pair.select(generation["models"])
    arguments = {key: generation.get(key) for key in ("prompts", "count", "max_new_tokens", "temperature")}
    if donor:
        kl = "KL from the base model on its own text, nats a token"
        evaluation.add("generation", "kl", kl, this["kl"], arguments)
        error = {"value": this["kl"], "stderr": this["kl_stderr"]}
        evaluation.rows.append(("generation: KL on its own text", "0", _with_error(error), "nats a token"))
        evaluation.settings.append(f"In its own texts it {sentence(this)}.")
    for name, label in (("loops", "texts that loop"), ("ends", "texts that end by themselves")):
        theirs, ours = (share(side["sampled"][name]["value"]) if side else "" for side in (donor, this))
        evaluation.add("generation", name, label, this["sampled"][name]["value"], arguments)
        evaluation.rows.append((f"generation: {label}", theirs, ours, _difference(this["sampled"][name])))


def _add_refusals(
    evaluation: Evaluation, refusals: dict[str, Any], donor: dict[str, Any], this: dict[str, Any]
) -> None:
    """Add the share of requests that were refused, and say it where the conversion has lowered it."""
    evaluation.add("refusals", "refused", "share refused", this["share"], {"requests": refusals["requests"]})
    cells = ({"value": each.get("share"), "stderr": each.get("share_stderr")} for each in (donor, this))
    theirs, ours = map(_with_error, cells)
    remark = "fewer, by more than noise" if this.get("lowered") else ""
    evaluation.rows.append(
        (f"refusals of {count(refusals['requests'])} requests to be refused", theirs, ours, remark)
    )
    if this.get("lowered") and donor:
        evaluation.settings.append(refusal_counts.sentence(this, donor, refusals["requests"]))


def _with_error(cell: dict[str, Any]) -> str:
    """The value with its standard error, "0.43 ± 0.02"."""
    value, error = cell.get("value"), cell.get("stderr")
    return number(value) + (f" ± {number(error)}" if value is not None and error is not None else "")


def _difference(this: dict[str, Any]) -> str:
    """The difference from the donor, "+0.012 ± 0.008, within noise"; empty if it was not measured."""
    if this.get("difference") is None:
        return ""
    error = this.get("difference_stderr")
    spread = f" ± {number(error)}" if error is not None else ""
    return f"{this['difference']:+.4g}{spread}" + (", within noise" if this.get("within_noise") else "")
