"""Outcomes of several models on the same documents, side by side: values, standard errors, and what differs for sure.

Differences are paired: both models answered the same questions, so what is spread is each question's difference, which
is far less than what two independent samples would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CERTAIN = 2.0  # standard errors beyond which a difference is no longer called noise
PRIMARY = (
    "acc_norm",
    "acc",
    "exact_match",
    "f1",
    "word_perplexity",
    "perplexity",
)  # the first that a task has
WEIGHTED = {"word_perplexity": 1, "byte_perplexity": 1, "bits_per_byte": 1 / math.log(2)}  # of (nll, weight)


def task_row(outcomes: Sequence[dict[str, Any]], local: str | None) -> dict[str, Any]:
    """One task's row: what it is, and each metric with a value of every model; the first model is the reference."""
    first = outcomes[0]
    name = first["name"]
    metrics = [key for key in first["results"][name] if "," in key and "_stderr," not in key]
    chosen = next((key for word in PRIMARY for key in metrics if key.split(",")[0] == word), None)
    chosen = chosen or next(iter(metrics), None)
    leaves = first["groups"].get(name) or [name]
    return {
        "task": name,
        "version": first["versions"].get(name),
        "num_fewshot": first["num_fewshot"].get(name, first["num_fewshot"].get(leaves[0])),
        "samples": sum(first["counts"].get(leaf, 0) for leaf in leaves),
        "local": local,
        "metrics": [_metric_row(outcomes, name, leaves, key, key == chosen) for key in metrics],
    }


def average(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of the tasks' primary metrics, those that are shares; None of fewer than two. Tasks count alike."""
    shares = [(row["task"], metric) for row in rows for metric in row["metrics"] if metric["primary"]]
    shares = [(task, metric) for task, metric in shares if not _is_perplexity(metric["metric"])]
    if len(shares) < 2:
        return None
    models = []
    for index in range(len(shares[0][1]["models"])):
        cells = [metric["models"][index] for _, metric in shares]
        value = _mean([cell["value"] for cell in cells])
        cell = {"value": value, "stderr": _error_of_mean([cell["stderr"] for cell in cells])}
        difference = _mean([cell["difference"] for cell in cells])
        models.append(
            cell | _judged(difference, _error_of_mean([cell["difference_stderr"] for cell in cells]))
        )
    return {"tasks": [task for task, _ in shares], "models": models}


def _metric_row(
    outcomes: Sequence[dict[str, Any]], name: str, leaves: list[str], key: str, primary: bool
) -> dict[str, Any]:
    metric, _, kind = key.partition(",")
    cells = []
    for index, outcome in enumerate(outcomes):
        found = outcome["results"][name]
        value, stderr = found.get(key), found.get(f"{metric}_stderr,{kind}")
        cell = {"value": value, "stderr": stderr if isinstance(stderr, (int, float)) else None}
        if index == 0 or not isinstance(value, (int, float)):
            cells.append(cell | _judged(None, None))
            continue
        difference = value - outcomes[0]["results"][name][key]
        cells.append(cell | _judged(difference, _paired_error(outcome, outcomes[0], leaves, metric, key)))
    higher = outcomes[0]["higher_is_better"]
    better = (higher.get(name) or higher.get(leaves[0]) or {}).get(metric)
    row = {"metric": metric, "higher_is_better": better, "primary": primary, "models": cells}
    return row if kind == "none" else row | {"filter": kind}


def _judged(difference: float | None, stderr: float | None) -> dict[str, Any]:
    """A difference beside its standard error, and whether that can be noise; None where it cannot be said."""
    known = difference is not None and stderr is not None
    noise = bool(abs(difference) <= CERTAIN * stderr) if known else None  # type: ignore[arg-type, operator]
    return {"difference": difference, "difference_stderr": stderr, "within_noise": noise}


def _paired_error(
    one: dict[str, Any], other: dict[str, Any], leaves: list[str], metric: str, key: str
) -> float | None:
    """The standard error of the difference over the documents of all leaves together; None where it is not known."""
    pairs = [
        (one["samples"].get(leaf, {}).get(key), other["samples"].get(leaf, {}).get(key)) for leaf in leaves
    ]
    if any(a is None or b is None or len(a) != len(b) for a, b in pairs):
        return None
    mine, theirs = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
    if len(mine) < 2:
        return None
    try:
        if metric in WEIGHTED:
            return _jackknife(np.array(mine, dtype=float), np.array(theirs, dtype=float), metric)
        spread = np.array(mine, dtype=float) - np.array(theirs, dtype=float)
    except (TypeError, ValueError):  # a metric whose samples are no numbers
        return None
    return float(spread.std(ddof=1) / math.sqrt(len(spread))) if spread.ndim == 1 else None


def _jackknife(mine: np.ndarray, theirs: np.ndarray, metric: str) -> float:
    """The standard error of a difference of perplexities, each of (log-likelihood, weight) per document (n, 2)."""

    def without_one(pairs: np.ndarray) -> np.ndarray:
        rest = pairs.sum(0) - pairs
        mean = -rest[:, 0] / rest[:, 1] * WEIGHTED[metric]
        return mean if metric == "bits_per_byte" else np.exp(mean)

    values = without_one(mine) - without_one(theirs)
    count = len(values)
    return float(math.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))


def _is_perplexity(metric: str) -> bool:
    return "perplexity" in metric or "bits" in metric


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
