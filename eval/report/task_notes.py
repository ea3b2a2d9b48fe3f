"""Sentences on how tasks were asked, which stand below their table on the terminal, the page and the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tasks.generated_code import METRIC as PARSES


def notes(result: Mapping[str, Any]) -> list[str]:
    """Whether a chat template was used, code that was not run, and prompts that lack their middle; [] without tasks."""
    tasks = result.get("tasks") or []
    if not tasks:
        return []
    found = []
    if (result.get("settings") or {}).get("chat_template"):
        found.append("Tasks are asked through the chat template, with examples as turns of the conversation.")
    unrun = [task["task"] for task in tasks if any(metric["metric"] == PARSES for metric in task["metrics"])]
    if unrun:
        found.append(
            f"{', '.join(unrun)}: code was not run, so pass@1 is not known; {PARSES} is the share that is Python, with "
            "a body for the function that was asked for."
        )
    for task in tasks:
        for model, cut in zip(result["models"], task.get("cut_prompts") or (), strict=False):
            if cut:
                found.append(
                    f"{task['task']}: {cut} of {task['samples']} prompts are longer than {model['name']} reads, and "
                    "lack their middle."
                )
    return found
