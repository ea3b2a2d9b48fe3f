"""The table of tasks: values and differences from the donor with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.task_notes import notes
from ..report.units import count, number
from ..tasks.scores import is_share
from .blocks import Block, Cell, Heading, Paragraph, Table
from .verdict import reference

LEGEND = "≈ within 2 standard errors of the paired difference"

APART = (
    "MMLU, the tasks of each language, and those that are answered in writing have means of their own and are not in "
    "the average."
)


def tasks(result: Mapping[str, Any]) -> list[Block]:
    """The table of primary metrics with their average, and a collapsed table of the others; empty without tasks."""
    scored_tasks = result.get("tasks") or []
    if not scored_tasks:
        return []
    columns = ["task", *(model["name"] for model in result["models"])]
    primary, others = (
        [
            _metric_row(task, metric)
            for task in scored_tasks
            for metric in task["metrics"]
            if bool(metric.get("primary")) is wanted
        ]
        for wanted in (True, False)
    )
    average = result.get("average")
    if average:
        label = Cell("average", _over(average))
        primary.append([label, *_cells(average["models"], True, True)])
    for mean in result.get("apart") or ():
        primary.append([Cell(mean["name"], _over(mean)), *_cells(mean["models"], True, True)])
    strong = [
        at
        for at, row in enumerate(primary)
        if at >= len(primary) - len(result.get("apart") or ()) - bool(average)
    ]
    note = (
        f"± is one standard error; below it the difference from {reference(result)}. {LEGEND}: such a difference "
        "is noise until more samples say otherwise. Percentages and points, where the metric is a share."
    )
    page: list[Block] = [Heading("Tasks"), Table(columns, primary, strong=strong), Paragraph(note)]
    if average:
        page.append(Paragraph(f"The average is over {', '.join(average['tasks'])}."))
    if result.get("apart"):
        page.append(Paragraph(APART))
    page += map(Paragraph, notes(result))
    return [*page, Table(columns, others, folded="Other metrics of these tasks")] if others else page


def _over(mean: Mapping[str, Any]) -> str:
    """ "of 3 tasks"."""
    return f"of {len(mean['tasks'])} task{'s' * (len(mean['tasks']) != 1)}"


def value_text(model: Mapping[str, Any], percent: bool) -> str:
    """The value with its standard error: "43.0 ± 2.2 %" in percent, else "22.75 ± 0.4"."""
    value, stderr = model.get("value"), model.get("stderr")
    if value is None:
        return ""
    if percent:
        return f"{100 * value:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "") + " %"
    return number(value) + (f" ± {stderr:.2g}" if stderr is not None else "")


def difference_text(model: Mapping[str, Any], percent: bool) -> str:
    """The difference from the donor, "−2.1 ± 0.8", in percentage points if `percent`; "≈" marks one within noise."""
    difference, stderr = model.get("difference"), model.get("difference_stderr")
    if difference is None:
        return ""
    if percent:
        text = f"{100 * difference:+.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")
    else:
        text = f"{difference:+.3g}" + (f" ± {stderr:.2g}" if stderr is not None else "")
    return text.replace("-", "−") + (" ≈" if model.get("within_noise") else "")


def _metric_row(task: Mapping[str, Any], metric: Mapping[str, Any]) -> list[str | Cell]:
    """The row of one metric: its name and settings, then a cell for each model."""
    notes = [str(metric["metric"]) + ("" if metric.get("higher_is_better", True) else " (lower is better)")]
    if task.get("num_fewshot") is not None:
        notes.append(f"{task['num_fewshot']}-shot")
    if task.get("samples") is not None:
        notes.append(f"{count(task['samples'])} samples")
    if task.get("local"):
        notes.append(f"from {task['local']}")
    higher = bool(metric.get("higher_is_better", True))
    notes += [f"part of {task['part_of']}"] if task.get("part_of") else []
    return [Cell(task["task"], ", ".join(notes)), *_cells(metric["models"], is_share(metric), higher)]


def _cells(models: Sequence[Mapping[str, Any]], percent: bool, higher: bool) -> list[Cell]:
    return [Cell(value_text(m, percent), difference_text(m, percent), _cell_class(m, higher)) for m in models]


def _cell_class(model: Mapping[str, Any], higher: bool) -> str:
    """The CSS class of a significant difference, "better" or "worse"; empty otherwise."""
    if not model.get("difference") or model.get("within_noise") is not False:
        return ""
    return "better" if (model["difference"] > 0) is higher else "worse"
