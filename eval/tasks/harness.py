"""EleutherAI's lm-evaluation-harness on a model that `open_model` opened: one task at a time, with stored results.

Questions, scores and standard errors are lm-eval's (`simple_evaluate`); this module gives it a model and stores its
results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from mhconvert import extras
from mhconvert.errors import MhconvertError, TextError

from ...convert.calibration.text_files import require_reader
from ..result_cache import Store
from ..settings import OWN_CACHE, EvalSettings
from ..vllm.engine import installed
from . import requirements
from .candidate import Candidate
from .language_model import language_model
from .outcome import plain_outcome
from .task_set import TaskSet, TaskSpec

ENDS_AND_CUTS = (
    2  # counts the ways in which texts ended and long prompts were cut: what is kept of another is not read
)

OnRows = Callable[[str, int, int], None]  # task, rows done, rows in all


def require_available(settings: EvalSettings) -> None:
    """Raises MhconvertError for a library or a backend that is not installed, or has no such cache."""
    if settings.has_tasks:
        extras.require("lm_eval", "a suite or a task", "texts and retrieval do without")
    for text in settings.text_files:
        if text.is_file():
            require_reader(text)
    if settings.backend == "vllm" and settings.kv_cache_dtype not in (OWN_CACHE, "fp8"):
        raise MhconvertError(
            f"vllm has no KV cache of dtype {settings.kv_cache_dtype}; choose --kv-cache-dtype fp8, or --backend hf"
        )
    if settings.backend == "vllm":
        installed(settings.python)


def evaluate(
    candidate: Candidate,
    tasks: TaskSet,
    store: Store,
    *,
    fresh: bool = False,
    on_rows: OnRows = lambda *_: None,
) -> list[dict[str, Any]]:
    """The outcome of each of `tasks.specs`, read from the store, or made and stored.

    Args:
        candidate: the model.
        tasks: what to run.
        store: keeps outcomes between runs.
        fresh: makes every outcome anew.
        on_rows: called with the task, the rows done and the rows in all.

    Returns:
        Outcomes as `plain_outcome` describes them, with the seconds taken. Under `accelerate launch` only the first
        process returns them, the others an empty list.
    """
    keys = [_task_key(candidate, spec) for spec in tasks.specs]
    outcomes = [None if fresh else store.load(key) for key in keys]
    if fresh and rank() == 0:
        store.forget_responses(responses_key(candidate))
    _barrier(candidate)
    for index, spec in enumerate(tasks.specs):
        if outcomes[index] is None:
            outcomes[index] = _evaluate_task(candidate, spec, tasks.manager, store, on_rows)
            if outcomes[index] is not None:
                store.save(keys[index], outcomes[index])
    return [outcome for outcome in outcomes if outcome is not None] if rank() == 0 else []


def all_stored(candidate: Candidate, tasks: TaskSet, store: Store) -> bool:
    """Whether `evaluate` would read every outcome from the store, so that the model need not be loaded."""
    return all(store.load(_task_key(candidate, spec)) is not None for spec in tasks.specs)


def _task_key(candidate: Candidate, spec: TaskSpec) -> dict[str, Any]:
    """Everything on which the outcome of a task depends."""
    settings = candidate.settings
    return responses_key(candidate) | {
        "task": spec.name,
        "digest": spec.digest,
        "num_fewshot": spec.num_fewshot,
        "limit": settings.limit,
        "chat_template": bool(settings.chat_template),
    }


def responses_key(candidate: Candidate) -> dict[str, Any]:
    """Everything on which the response to a prompt depends."""
    return candidate.key() | {"ends_and_cuts": ENDS_AND_CUTS}


def _evaluate_task(
    candidate: Candidate, spec: TaskSpec, manager: Any, store: Store, on_rows: OnRows
) -> dict[str, Any] | None:
    """The outcome of one task; None in processes other than the first."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # of the working directory, where git may print errors
    evaluator.add_env_info = lambda results: None  # runs pip for every task, and is no part of an outcome
    started = time.perf_counter()
    loaded = _load_documents(manager, spec)
    for name, task in loaded["tasks"].items():  # of a group, too
        marked = bool(getattr(task, "UNSAFE_CODE", False))
        requirements.refuse_code(name, candidate.settings, marked=marked)
    lm = language_model(candidate)
    _require_room(candidate, lm, loaded["tasks"])
    rolling = any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in loaded["tasks"].values())
    if candidate.settings.backend == "hf":
        lm.batch_size_per_gpu = candidate.batch_size(rolling)
    lm.on_rows = lambda done, total: on_rows(spec.name, done, total)
    group = loaded["groups"].get(spec.name)
    with store.database_errors(responses_key(candidate)):
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=list(loaded["tasks"].values()) if group is None else [group],
            num_fewshot=spec.num_fewshot,
            limit=candidate.settings.limit,
            apply_chat_template=bool(candidate.settings.chat_template),
            use_cache=store.responses(responses_key(candidate)),
            task_manager=manager,
            confirm_run_unsafe_code=candidate.settings.run_generated_code,
        )
    if results is None:
        return None
    written = {
        "generative": _generative(loaded["tasks"]),
        "cut_prompts": _cut_prompts(lm, results["samples"]),
    }
    return plain_outcome(spec.name, results) | written | {"seconds": time.perf_counter() - started}


def _generative(tasks: dict[str, Any]) -> bool:
    """Whether the tasks are answered in writing."""
    return all(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())


def _require_room(candidate: Candidate, lm: Any, tasks: dict[str, Any]) -> None:
    """Raises MhconvertError where a task asks for as many new tokens as the model reads."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until" and lm.room(task.config.generation_kwargs) < 1:
            raise MhconvertError(
                f"task {name} asks for more new tokens than {candidate.name} reads, or --max-length allows, and leaves "
                "no room for a question; leave the task out, or give a larger --max-length"
            )


def _cut_prompts(lm: Any, samples: dict[str, Any]) -> int:
    """How many prompts of texts to write were longer than fits, so that their middle was left out."""
    asked = {
        (task, document["doc_id"]): document["arguments"][0]
        for task, documents in samples.items()
        for document in documents
    }
    return sum(
        len(lm.tok_encode(arguments[0])) > lm.room(arguments[1])
        for arguments in asked.values()
        if len(arguments) > 1 and isinstance(arguments[1], dict)
    )


def _load_documents(manager: Any, spec: TaskSpec) -> Any:
    """lm-eval's tasks of `spec` with their documents. Raises TextError where these cannot be loaded."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return manager.load([spec.name])
    except (OSError, DatasetGenerationError) as error:  # datasets' errors of the Hub are OSErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        remedy = f"look at {spec.local}" if spec.local else "give a folder with a local copy by --data"
        raise TextError(
            f"the documents of task {spec.name} cannot be had: {reason[:200]}; {remedy}"
        ) from error


def rank() -> int:
    """The rank of this process under `accelerate launch`; otherwise 0."""
    return int(os.environ.get("RANK", "0"))


def _barrier(candidate: Candidate) -> None:
    """Returns when all processes have read the store, so that they agree on which tasks to run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        language_model(candidate).barrier()
