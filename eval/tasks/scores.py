"""Outcomes of several models on the same documents, side by side: values, standard errors, and what differs for sure.

Differences are paired: both models answered the same questions, so what is spread is each question's difference, which
is far less than what two independent samples would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
WEIGHTED = {  # metrics of (log-likelihood, weight) pairs, and what a mean is multiplied by
    "word_perplexity": 1.0,
    "byte_perplexity": 1.0,
    "bits_per_byte": 1 / math.log(2),
}
PERPLEXITY = "perplexity"  # of log-likelihoods, each of weight 1


def task_row(outcomes: Sequence[dict[str, Any]], local: str | None) -> dict[str, Any]:
    """One task's row: what it is, and each metric with a value of every model; the first model is the reference."""
    first = outcomes[0]
    name = first["name"]
    metrics = [key for key in first["results"][name] if "," in key and "_stderr," not in key]
    chosen = next((key for word in PRIMARY for key in metrics if key.split(",")[0] == word), None)
    chosen = chosen or next(iter(metrics), None)
    leaves = _leaves(name, first["groups"])
    return {
        "task": name,
        "version": first["versions"].get(name),
        "num_fewshot": first["num_fewshot"].get(name, first["num_fewshot"].get(leaves[0])),
        "samples": sum(first["counts"].get(leaf, 0) for leaf in leaves),
        "local": local,
        "metrics": [_metric_row(outcomes, name, leaves, key, key == chosen) for key in metrics],
    }


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, and of the groups in it, each once; a task itself."""
    if not groups.get(name):
        return [name]
    found = [leaf for member in groups[name] for leaf in _leaves(member, groups)]
    return list(dict.fromkeys(found))


def is_share(metric: Mapping[str, Any]) -> bool:
    """Whether a metric row's values are shares of 1, to be shown in percent: by its name, and by what was measured."""
    values = [model.get("value") for model in metric["models"]]
    return not _is_loss(str(metric["metric"])) and all(
        value is None or (isinstance(value, (int, float)) and 0 <= value <= 1) for value in values
    )


def average(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of the tasks' primary metrics, those that are shares; None of fewer than two. Tasks count alike."""
    shares = [(row["task"], metric) for row in rows for metric in row["metrics"] if metric["primary"]]
    shares = [(task, metric) for task, metric in shares if _averaged(metric)]
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
    """The standard error of the difference over the documents of all leaves; None where it is not known.

    A group's value is the mean of its documents, or of its tasks: whichever of the two it is.
    """
    pairs = [
        (one["samples"].get(leaf, {}).get(key), other["samples"].get(leaf, {}).get(key)) for leaf in leaves
    ]
    if any(a is None or b is None or len(a) != len(b) or len(a) < 2 for a, b in pairs):
        return None
    try:
        found = [tuple(_numbers(values, metric) for values in pair) for pair in pairs]
    except (TypeError, ValueError):  # a metric whose samples are no numbers
        return None
    if metric in WEIGHTED or metric == PERPLEXITY:
        ours, others = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
        return _jackknife(ours, others, metric)
    if any(mine.ndim != 1 for mine, _ in found):
        return None
    value, tasks = one["results"][one["name"]].get(key), [float(mine.mean()) for mine, _ in found]
    whole = np.concatenate([mine - theirs for mine, theirs in found])
    if len(found) == 1 or _same(value, float(np.concatenate([mine for mine, _ in found]).mean())):
        return float(whole.std(ddof=1) / math.sqrt(len(whole)))
    if not _same(value, sum(tasks) / len(tasks)):
        return None
    errors = [(mine - theirs).std(ddof=1) / math.sqrt(len(mine)) for mine, theirs in found]
    return _error_of_mean([float(error) for error in errors])


def _numbers(values: list[Any], metric: str) -> np.ndarray:
    found = np.array(values, dtype=float)
    return np.stack([found, np.ones_like(found)], 1) if metric == PERPLEXITY else found


def _same(value: Any, mean: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12)


def _jackknife(mine: np.ndarray, theirs: np.ndarray, metric: str) -> float:
    """The standard error of a difference of perplexities, each of (log-likelihood, weight) per document (n, 2)."""

    def without_one(pairs: np.ndarray) -> np.ndarray:
        rest = pairs.sum(0) - pairs
        mean = -rest[:, 0] / rest[:, 1] * WEIGHTED.get(metric, 1.0)
        return mean if metric == "bits_per_byte" else np.exp(mean)

    values = without_one(mine) - without_one(theirs)
    count = len(values)
    return float(math.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))


def _is_loss(metric: str) -> bool:
    return any(word in metric for word in ("perplexity", "bits", "nll", "loss"))


def _averaged(metric: Mapping[str, Any]) -> bool:
    return is_share(metric) and metric["higher_is_better"] is not False


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
