"""lm-eval's results of one task in the form that is stored and compared."""

from __future__ import annotations

from typing import Any


def plain_outcome(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results of the task or group `name` in plain JSON types, without prompts and responses.

    Args:
        results: what `simple_evaluate` returns.

    Returns:
        results: task or group -> metrics; samples: task -> "metric,filter" -> the value of each document, in their
        order; groups: group -> its tasks; versions, counts (documents), num_fewshot and higher_is_better by task.
    """
    metrics_of = {task: _plain(metrics) for task, metrics in results["results"].items()}
    metrics_of |= {group: _plain(metrics) for group, metrics in results.get("groups", {}).items()}
    samples: dict[str, dict[str, list[Any]]] = {}
    for task, documents in results["samples"].items():
        values = samples.setdefault(task, {})
        for document in sorted(documents, key=lambda sample: sample["doc_id"]):
            for metric in document["metrics"]:
                values.setdefault(f"{metric},{document['filter']}", []).append(_plain(document[metric]))
    return {
        "name": name,
        "results": metrics_of,
        "samples": samples,
        "groups": {
            name: list(members) for name, members in results.get("group_subtasks", {}).items() if members
        },
        "versions": _plain(results["versions"]),
        "counts": {task: count["effective"] for task, count in results["n-samples"].items()},
        "num_fewshot": _plain(results["n-shot"]),
        "higher_is_better": _plain(results["higher_is_better"]),
    }


def _plain(value: Any) -> Any:
    """`value` as dictionaries, lists, strings, numbers and None; other objects become strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
