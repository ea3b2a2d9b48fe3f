"""`mhconvert eval`: a donor and models made from it, on texts, on lm-eval tasks, in retrieval and as writers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mhconvert.library_versions import versions
from mhconvert.progress import Listener, Progress

from ..convert.open_model import OpenModel
from . import refusals, retrieval_results, text_choice, texts
from .compared_models import candidates_of, describe, open_models
from .result_cache import Store
from .settings import EvalSettings
from .tasks import harness, ruler, scores
from .tasks.candidate import Candidate, LazyModel
from .tasks.chat_template import asked_through
from .tasks.harness import OnRows
from .tasks.language_model import language_model
from .tasks.task_choice import resolve
from .tasks.task_set import TaskSet
from .text_choice import Text
from .vllm.engine import EngineError, installed, loadable
from .writing import prompts
from .writing.comparison import measure as measure_writing
from .writing.prompts import Asked


def evaluate(
    checkpoints: Sequence[str],
    settings: EvalSettings,
    *,
    against: str | None,
    device: str | None,
    trust_remote_code: bool,
    on_progress: Listener,
    fresh: bool = False,
    store: Store | None = None,
) -> dict[str, Any]:
    """What `api.evaluate` returns: the results of all models, the donor first.

    Args:
        checkpoints: references of the models.
        settings: what is evaluated.
        against: the donor; by default the one that the first checkpoint was made from.
        device, trust_remote_code: CUDA by default where there is one; lets a checkpoint run its own code.
        on_progress, fresh, store: as in `Run`; what was finished before an error is not measured again.
    Raises MhconvertError as `open_models`.
    """
    started = time.perf_counter()
    harness.require_available(settings)
    asked = (text_choice.chosen(settings), prompts.asked(settings), refusals.asked(settings))
    with tempfile.TemporaryDirectory(prefix="mhconvert-tasks-") as folder:
        tasks = resolve(settings, Path(folder)) if settings.has_tasks else None
        how = (bool(settings.text), device, trust_remote_code, on_progress, settings.kv_cache_dtype)
        opened = open_models(checkpoints, against, *how, settings.long_context is not None)
        if tasks is not None:
            settings, tasks = _for_models(settings, tasks, opened)
        run = Run(settings, *asked, store or Store(), fresh, on_progress)
        text_rows = text_choice.token_rows(run.texts, opened, beyond=settings.long_context is not None)
        prompt_rows, candidates = _prompt_rows(run, opened), candidates_of(opened, settings)
        on_texts = _measure_texts(run, candidates, text_rows, prompt_rows)
        candidates, left_out = _without_unloadable(run, candidates, checkpoints, tasks)
        outcomes, probes, refused = _measure_models(run, candidates, tasks)
    if harness.rank() != 0:
        return {}
    on_progress(Progress("done", 1, 1))
    return {
        "models": [describe(each) for each in candidates],
        "left_out": left_out,
        **on_texts,
        **_task_results(tasks, outcomes),
        "retrieval": retrieval_results.table(probes),
        "refusals": refusals.table(settings, run.requests, refused),
        "settings": _recorded_settings(settings, candidates[0]),
        "versions": _versions(tasks is not None, settings),
        "seconds": time.perf_counter() - started,
    }


def _for_models(
    settings: EvalSettings, tasks: TaskSet, opened: Sequence[OpenModel]
) -> tuple[EvalSettings, TaskSet]:
    """Whether the donor is asked through its chat template, and the tasks with texts made of its tokens."""
    settings = replace(settings, chat_template=asked_through(settings, opened[0]))
    return settings, ruler.written(tasks, opened, settings)


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        settings: what is evaluated.
        texts: that are read.
        asked: what the models write; None: nothing.
        requests: to be refused.
        store: keeps results between runs.
        fresh: measures everything anew.
        on_progress: called with the progress.
    """

    settings: EvalSettings
    texts: list[Text]
    asked: Asked | None
    requests: list[str]
    store: Store
    fresh: bool
    on_progress: Listener


def _measure_texts(
    run: Run, candidates: list[Candidate], rows: dict[str, Tensor], prompts: list[list[list[int]]]
) -> dict[str, Any]:
    """Texts that are read and written: `texts.measure` of `rows`, by the text's name, and generation, which is
    `writing.comparison.measure` of the token ids of each model's prompts, None where nothing is asked.

    In the first process; {} in the others.
    """
    if harness.rank() != 0:
        return {}
    models = (LazyModel(candidates[0]), candidates[1:])  # the donor is read once for both
    kept: dict[str, Any] = {"fresh": run.fresh, "on_rows": _row_listener(run.on_progress)}
    written = measure_writing(*models, run.asked, prompts, run.store, **kept) if run.asked else None
    kinds = {text.name: text.kind for text in run.texts if text.kind}
    return texts.measure(*models, rows, run.store, kinds=kinds, **kept) | {"generation": written}


def _measure_models(
    run: Run, candidates: list[Candidate], tasks: TaskSet | None
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]], list[list[bool]]]:
    """Tasks, retrieval and refusals, with one model in memory at a time.

    Returns:
        Per model the results of each task, those of retrieval, and whether each request was refused, in the first
        process; each empty where it is not measured.
    """
    outcomes, probes, refused = [], [], []
    for candidate in candidates:
        try:
            if tasks is not None:
                on_rows = _row_listener(run.on_progress, candidate)
                outcomes.append(
                    harness.evaluate(candidate, tasks, run.store, fresh=run.fresh, on_rows=on_rows)
                )
            if run.settings.retrieval and harness.rank() == 0:
                probes.append(
                    retrieval_results.probe(
                        candidate, run.fresh, run.store, _row_listener(run.on_progress, candidate)
                    )
                )
            if run.requests and harness.rank() == 0:
                on_rows = _row_listener(run.on_progress, candidate)
                refused.append(
                    refusals.probe(candidate, run.requests, run.store, fresh=run.fresh, on_rows=on_rows)
                )
        finally:
            candidate.release()
    return outcomes, probes, refused


def _without_unloadable(
    run: Run, candidates: list[Candidate], asked: Sequence[str], tasks: TaskSet | None
) -> tuple[list[Candidate], list[dict[str, str]]]:
    """The models without a donor that vLLM does not load, if it was not asked for and only tasks are measured.

    Returns:
        The models; of the one that is left out its reference, and why.
    """
    settings, (donor, *others) = run.settings, candidates
    if settings.backend != "vllm" or tasks is None:
        return candidates, []
    for each in others:
        loadable(each.opened)
    beside_tasks = run.texts or settings.retrieval or settings.refusals or run.asked
    if beside_tasks or not others or donor.opened.reference in asked:
        return candidates, []
    if not run.fresh and harness.all_stored(donor, tasks, run.store):
        return candidates, []  # it was loaded once, and need not be now
    try:
        language_model(donor).engine.score([[0, 0]])  # some refusals come with the first request
    except EngineError as error:
        return others, [{"reference": donor.opened.reference, "why": str(error)}]
    return candidates, []


def _task_results(tasks: TaskSet | None, outcomes: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """tasks: rows of each task, of all models; average and apart: over the tasks, None and [] without any."""
    if tasks is None:
        return {"tasks": [], "average": None, "apart": []}
    local = {spec.name: spec.local.name if spec.local else None for spec in tasks.specs}
    rows = [
        row
        for of_task in zip(*outcomes, strict=True)
        for row in scores.task_rows(of_task, local[of_task[0]["name"]])
    ]
    return {"tasks": rows, "average": scores.average(rows), "apart": scores.apart(rows)}


def _prompt_rows(run: Run, opened: list[OpenModel]) -> list[list[list[int]]]:
    """Token ids of each model's prompts, before anything is measured; of requests, whether each model can read them."""
    for each in opened if run.requests else ():
        refusals.token_rows(each, run.requests)
    return [prompts.prompt_rows(each, run.asked) for each in opened if run.asked]


def _row_listener(on_progress: Listener, candidate: Candidate | None = None) -> OnRows:
    """Passes the rows done of a task on to `on_progress`, with the model's name in the message."""

    def on_rows(task: str, done: int, total: int) -> None:
        on_progress(Progress("tasks", done, total, f"{candidate.name}: {task}" if candidate else task))

    return on_rows


def _recorded_settings(settings: EvalSettings, first: Candidate) -> dict[str, Any]:
    """The settings that the results depend on, with batch size and device as they were for the first model."""
    return {
        "suite": settings.suite,
        "limit": settings.limit,
        "chat_template": bool(settings.chat_template),
        "batch_size": first.batch_size(False),
        "max_length": settings.max_length,
        "backend": settings.backend,
        "device": first.opened.device,
    }


def _versions(tasks: bool, settings: EvalSettings) -> dict[str, str]:
    """Versions of libraries; with `tasks` lm-eval's too, and vLLM's where it runs them."""
    if not tasks:
        return versions()
    import lm_eval

    of_vllm = {"vllm": installed(settings.python)["vllm"]} if settings.backend == "vllm" else {}
    return versions() | {"lm_eval": lm_eval.__version__} | of_vllm
