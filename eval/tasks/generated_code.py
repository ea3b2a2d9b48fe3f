"""HumanEval without running what a model wrote: whether it parses. Code is run only where that is asked for."""

from __future__ import annotations

import ast
from typing import Any

from .local_data import Function, LocalTask, standard_config

UNRUN = {  # tasks that have a form without running code, and lm-eval's YAML of each
    "humaneval": "humaneval/humaneval.yaml",
    "humaneval_instruct": "humaneval/humaneval_instruct.yaml",
}
METRIC = "parses"
FENCE = "```"


def unrun(name: str, local: LocalTask | None) -> LocalTask:
    """The task `name` of UNRUN with lm-eval's questions and the metric METRIC; `local`: over a local file."""
    of_file = {key: value for key, value in local.config.items() if key != "include"} if local else {}
    config = standard_config(UNRUN[name]) | {
        "task": name,
        "unsafe_code": False,
        "filter_list": None,
        "process_results": Function(f"{__name__}.parses"),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    return LocalTask(name, local.file if local else None, config | of_file)


def parses(document: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """{METRIC: 1.0} where the problem with its continuation, up to the end of the block, parses as Python and the asked
    function has a body beside its docstring; else 0.0. The code is not run."""
    code = document["prompt"] + responses[0].partition(FENCE)[0]
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the parser raises for odd text
        return {METRIC: 0.0}
    return {METRIC: float(any(_has_body(node, document["entry_point"]) for node in ast.walk(tree)))}


def _has_body(node: ast.AST, name: str) -> bool:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name != name:
        return False
    return len(node.body) > (ast.get_docstring(node, clean=False) is not None)
