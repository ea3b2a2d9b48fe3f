"""What lm-eval found for one task, in the form that is stored and compared."""

from __future__ import annotations

from typing import Any


def plain_outcome(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's answer for the task or group `name` in plain JSON types, without its prompts and responses.

    results: task or group -> metrics; samples: task -> "metric,filter" -> a value of each document, in their order;
    groups: group -> its tasks; versions, counts (documents), num_fewshot and higher_is_better by task.
    """
    results = {task: _plain(metrics) for task, metrics in found["results"].items()}
    results |= {group: _plain(metrics) for group, metrics in found.get("groups", {}).items()}
    samples: dict[str, dict[str, list[Any]]] = {}
    for task, documents in found["samples"].items():
        values = samples.setdefault(task, {})
        for document in sorted(documents, key=lambda sample: sample["doc_id"]):
            for metric in document["metrics"]:
                values.setdefault(f"{metric},{document['filter']}", []).append(_plain(document[metric]))
    return {
        "name": name,
        "results": results,
        "samples": samples,
        "groups": {
            name: list(members) for name, members in found.get("group_subtasks", {}).items() if members
        },
        "versions": _plain(found["versions"]),
        "counts": {task: count["effective"] for task, count in found["n-samples"].items()},
        "num_fewshot": _plain(found["n-shot"]),
        "higher_is_better": _plain(found["higher_is_better"]),
    }


def _plain(value: Any) -> Any:
    """Dictionaries, lists, text, numbers and None; what lm-eval has beyond these, as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
