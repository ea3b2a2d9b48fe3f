"""Scores of several models on the same documents: values, standard errors, and which differences are significant.

Differences are paired: as all models answer the same questions, the standard error is that of the differences per
question, which is far smaller than for two independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .apart import MMLU, part
from .generated_code import METRIC as PARSES

SIGNIFICANT = 2.0  # standard errors; a smaller difference counts as noise
# The first of these that a task has is its primary metric.
PRIMARY = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
WEIGHTED = {  # metrics of (log-likelihood, weight) pairs -> the factor of their weighted mean
    "word_perplexity": 1.0,
    "byte_perplexity": 1.0,
    "bits_per_byte": 1 / math.log(2),
}
GENERATIVE = "generative tasks"
NO_SCORE = (PARSES,)  # shares that say nothing about right answers
PERPLEXITY = "perplexity"  # of log-likelihoods with equal weights


def task_rows(outcomes: Sequence[dict[str, Any]], local: str | None) -> list[dict[str, Any]]:
    """`task_row`, and with `part_of` a row of each group and each language in it where the task is a group."""
    first = outcomes[0]
    rows = [task_row(outcomes, local)]
    for member in first["groups"].get(first["name"], ()):
        own = part(member) not in (None, MMLU) and part(member) != part(first["name"])
        if member in first["results"] and (own or first["groups"].get(member)):
            row = task_row([outcome | {"name": member} for outcome in outcomes], local)
            rows.append(row | {"part_of": first["name"]})
    return rows


def task_row(outcomes: Sequence[dict[str, Any]], local: str | None) -> dict[str, Any]:
    """One task with the values of every model in every metric.

    Args:
        outcomes: of each model, as `plain_outcome` describes them; the first is the reference of differences.
        local: the name of the local file that the documents are from.
    """
    first = outcomes[0]
    name = first["name"]
    metrics = [key for key in first["results"][name] if "," in key and "_stderr," not in key]
    by_rank = [key for metric in PRIMARY for key in metrics if key.split(",")[0] == metric]
    primary = next(iter(by_rank or metrics), None)
    leaves = _leaves(name, first["groups"])
    return {
        "task": name,
        "version": first["versions"].get(name),
        "num_fewshot": first["num_fewshot"].get(name, first["num_fewshot"].get(leaves[0])),
        "samples": sum(first["counts"].get(leaf, 0) for leaf in leaves),
        "local": local,
        **({"generative": True} if first.get("generative") else {}),
        **_of_prompts(outcomes),
        "metrics": [_metric_row(outcomes, name, leaves, key, key == primary) for key in metrics],
    }


def _of_prompts(outcomes: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """cut_prompts: how many prompts of each model lack their middle; {} where none does."""
    cut = [outcome.get("cut_prompts", 0) for outcome in outcomes]
    return {"cut_prompts": cut} if any(cut) else {}


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of the group `name` and of the groups in it, each once; `[name]` for a task."""
    if not groups.get(name):
        return [name]
    return list(dict.fromkeys(leaf for member in groups[name] for leaf in _leaves(member, groups)))


def is_share(metric: Mapping[str, Any]) -> bool:
    """Whether the values of a metric row are fractions, shown in percent: all in [0, 1], and not a loss by its name."""
    values = [model.get("value") for model in metric["models"]]
    return not _is_loss(str(metric["metric"])) and all(
        value is None or (isinstance(value, (int, float)) and 0 <= value <= 1) for value in values
    )


def average(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The unweighted mean over tasks of the primary metrics that are fractions; None with fewer than two of them.

    MMLU, tasks in a language and those answered in writing are not in it, nor groups of such: see `apart`.
    """
    languages = {
        row["part_of"] for row in rows if row.get("part_of") and part(row["task"]) not in (None, MMLU)
    }
    plain = [
        row for row in rows if not row.get("part_of") and _part(row) is None and row["task"] not in languages
    ]
    mean = _mean_row(plain)
    return mean if mean and len(mean["tasks"]) > 1 else None


def apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `average`, with the `name` MMLU, of a language, or of tasks answered in writing, the mean of each, over one
    task or more.

    Subjects of an MMLU that was run as a whole count in it alone.
    """
    of_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = _part(row)
        within = row.get("part_of") and _part(row | {"task": row["part_of"]}) == name
        if name is not None and not within:
            of_name.setdefault(name, []).append(row)
    means = {name: _mean_row(found) for name, found in of_name.items()}
    return [{"name": name, **mean} for name, mean in means.items() if mean is not None]


def _part(row: Mapping[str, Any]) -> str | None:
    """What the row's task is apart as: `part` of its name, and whether it is answered in writing."""
    name = part(row["task"])
    if not row.get("generative"):
        return name
    return GENERATIVE if name is None else f"{GENERATIVE}, {name}"


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """tasks, models: the mean of primary metrics that are fractions; None without any."""
    shares = [
        (row["task"], metric)
        for row in rows
        for metric in row["metrics"]
        if metric["primary"]
        and is_share(metric)
        and metric["higher_is_better"] is not False
        and metric["metric"] not in NO_SCORE
    ]
    if not shares:
        return None
    models = []
    for index in range(len(shares[0][1]["models"])):
        cells = [metric["models"][index] for _, metric in shares]
        value = _mean([cell["value"] for cell in cells])
        cell = {"value": value, "stderr": _error_of_mean([cell["stderr"] for cell in cells])}
        difference = _mean([cell["difference"] for cell in cells])
        models.append(
            cell | _difference(difference, _error_of_mean([cell["difference_stderr"] for cell in cells]))
        )
    return {"tasks": [task for task, _ in shares], "models": models}


def _metric_row(
    outcomes: Sequence[dict[str, Any]], name: str, leaves: list[str], key: str, primary: bool
) -> dict[str, Any]:
    """The row of the metric `key`, "metric,filter" in lm-eval's results, of the task or group `name`."""
    metric, _, answer_filter = key.partition(",")
    cells = []
    for index, outcome in enumerate(outcomes):
        results = outcome["results"][name]
        value, stderr = results.get(key), results.get(f"{metric}_stderr,{answer_filter}")
        cell = {"value": value, "stderr": stderr if isinstance(stderr, (int, float)) else None}
        if index == 0 or not isinstance(value, (int, float)):
            cells.append(cell | _difference(None, None))
            continue
        difference = value - outcomes[0]["results"][name][key]
        cells.append(cell | _difference(difference, _paired_error(outcome, outcomes[0], leaves, metric, key)))
    higher = outcomes[0]["higher_is_better"]
    better = (higher.get(name) or higher.get(leaves[0]) or {}).get(metric)
    row = {"metric": metric, "higher_is_better": better, "primary": primary, "models": cells}
    return row if answer_filter == "none" else row | {"filter": answer_filter}


def _difference(difference: float | None, stderr: float | None) -> dict[str, Any]:
    """A difference with its standard error, and whether it is within noise; None where that is unknown."""
    known = difference is not None and stderr is not None
    noise = bool(abs(difference) <= SIGNIFICANT * stderr) if known else None  # type: ignore[arg-type, operator]
    return {"difference": difference, "difference_stderr": stderr, "within_noise": noise}


def _paired_error(
    outcome: dict[str, Any], reference: dict[str, Any], leaves: list[str], metric: str, key: str
) -> float | None:
    """The standard error of the difference over the documents of all leaves; None where it is unknown.

    A group's value is the mean over its documents or over its tasks; which of the two is found by comparing it.
    """
    pairs = [
        tuple(model["samples"].get(leaf, {}).get(key) for model in (outcome, reference)) for leaf in leaves
    ]
    if any(a is None or b is None or len(a) != len(b) or len(a) < 2 for a, b in pairs):
        return None
    try:
        arrays = [tuple(_numbers(values, metric) for values in pair) for pair in pairs]
    except (TypeError, ValueError):  # the samples of this metric are not numbers
        return None
    if metric in WEIGHTED or metric == PERPLEXITY:
        mine, theirs = (np.concatenate(samples) for samples in zip(*arrays, strict=True))
        return _jackknife(mine, theirs, metric)
    if any(mine.ndim != 1 for mine, _ in arrays):
        return None
    value = outcome["results"][outcome["name"]].get(key)
    differences = [mine - theirs for mine, theirs in arrays]
    if len(arrays) == 1 or _close(value, float(np.concatenate([mine for mine, _ in arrays]).mean())):
        return _standard_error(np.concatenate(differences))
    if not _close(value, sum(float(mine.mean()) for mine, _ in arrays) / len(arrays)):
        return None
    return _error_of_mean([_standard_error(task) for task in differences])


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _numbers(values: list[Any], metric: str) -> np.ndarray:
    """The samples of a metric: (documents,), or (documents, 2) for (log-likelihood, weight) pairs."""
    array = np.array(values, dtype=float)
    return np.stack([array, np.ones_like(array)], 1) if metric == PERPLEXITY else array


def _close(value: Any, mean: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12)


def _jackknife(mine: np.ndarray, theirs: np.ndarray, metric: str) -> float:
    """The jackknife standard error of a difference of perplexities, from (log-likelihood, weight) pairs (n, 2)."""

    def without_one(pairs: np.ndarray) -> np.ndarray:
        rest = pairs.sum(0) - pairs
        mean = -rest[:, 0] / rest[:, 1] * WEIGHTED.get(metric, 1.0)
        return mean if metric == "bits_per_byte" else np.exp(mean)

    values = without_one(mine) - without_one(theirs)
    count = len(values)
    return float(math.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))


def _is_loss(metric: str) -> bool:
    return any(part in metric for part in ("perplexity", "bits", "nll", "loss"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
