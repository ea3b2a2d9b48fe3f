"""EleutherAI's lm-evaluation-harness on a model that `open_model` opened: one task at a time, each result kept.

What is asked, how it is scored and its standard error are lm-eval's (`simple_evaluate`); here a model is handed to it,
and its results are put into the form that the rest of the package reads.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import MhconvertError, TextError

from ...convert.open_model import OpenModel
from ..result_cache import Store
from ..settings import EvalSettings
from .outcome import plain_outcome
from .task_choice import Spec, TaskSet

CPU_BATCH = (
    8  # lm-eval's own search begins with 64 rows of the maximal length, which no memory of a CPU holds
)
ROLLING_BATCH = 1  # rows as long as the model reads, with logits of every position


def require_available(settings: EvalSettings) -> None:
    """Raises MhconvertError for a backend that is not installed here, or a dtype that torch does not have."""
    if settings.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MhconvertError("--backend vllm needs vllm, which is not installed here; use --backend hf")
    if settings.dtype is not None and not isinstance(getattr(torch, settings.dtype, None), torch.dtype):
        raise MhconvertError(f"'{settings.dtype}' is no dtype; use bfloat16, float16 or float32")


@dataclass
class Candidate:
    """A model under evaluation. fingerprint: of its files; its weights are read when the first task needs them."""

    opened: OpenModel
    fingerprint: str
    settings: EvalSettings
    lm: Any = None

    @property
    def name(self) -> str:
        """A donor's name, or that of the folder."""
        if self.opened.donor is not None and self.opened.adapter is None:
            return self.opened.donor.name
        if self.opened.folder == Path(self.opened.reference).expanduser():
            return self.opened.folder.resolve().name
        return self.opened.reference.partition("@")[0].rpartition("/")[2]  # of a model on the Hub

    @property
    def dtype(self) -> torch.dtype:
        """As asked for, or as the weights are stored."""
        if self.settings.dtype is not None:
            return getattr(torch, self.settings.dtype)
        if self.opened.donor is not None:
            return self.opened.donor.dtype
        stated = getattr(self.opened.config, "dtype", None) or torch.float32
        return getattr(torch, stated) if isinstance(stated, str) else stated

    def facts(self) -> dict[str, Any]:
        """What a response depends on, beside the question."""
        kind = torch.device(self.opened.device).type
        return {
            "model": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.settings.backend,
            "max_length": self.settings.max_length,
            "device": kind,
        }

    def batch_size(self, rolling: bool) -> int | str:
        """Rows a call; `rolling`: of rows as long as the model reads."""
        if self.settings.batch_size is not None:
            return self.settings.batch_size
        if torch.device(self.opened.device).type != "cpu":
            return "auto"
        return ROLLING_BATCH if rolling else CPU_BATCH


def evaluate(
    candidate: Candidate,
    tasks: TaskSet,
    store: Store,
    *,
    fresh: bool = False,
    on_rows: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """The outcome of each of `tasks.specs`: those that are stored are read, the others made and stored.

    An outcome has results (task -> lm-eval's metrics), samples (task -> metric -> a value of each document), groups
    (group -> its tasks), versions, counts, num_fewshot, higher_is_better and seconds. `fresh`: nothing stored is read.
    on_rows: task, rows done, rows in all. Under `accelerate launch` the first process returns outcomes, the others [].
    """
    facts = [_facts(candidate, spec) for spec in tasks.specs]
    found = [None if fresh else store.load(each) for each in facts]
    if fresh and rank() == 0:
        store.forget_responses(candidate.facts())
    _barrier(candidate)
    for index, spec in enumerate(tasks.specs):
        if found[index] is None:
            found[index] = _run(candidate, spec, tasks.manager, store, on_rows)
            if found[index] is not None:
                store.save(facts[index], found[index])
    return [outcome for outcome in found if outcome is not None] if rank() == 0 else []


def _facts(candidate: Candidate, spec: Spec) -> dict[str, Any]:
    settings = candidate.settings
    return candidate.facts() | {
        "task": spec.name,
        "digest": spec.digest,
        "num_fewshot": spec.num_fewshot,
        "limit": settings.limit,
        "chat_template": settings.chat_template,
    }


def _run(
    candidate: Candidate, spec: Spec, manager: Any, store: Store, on_rows: Callable[[str, int, int], None]
) -> dict[str, Any] | None:
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: (
        None
    )  # of the folder at hand, which is not lm-eval's; git complains aloud
    started = time.perf_counter()
    loaded = _load(manager, spec)
    lm = _language_model(candidate)
    rolling = any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in loaded["tasks"].values())
    if candidate.settings.backend == "hf":
        lm.batch_size_per_gpu = candidate.batch_size(rolling)
        lm.on_rows = lambda done, total: on_rows(spec.name, done, total)
    top = [loaded["groups"][spec.name]] if spec.name in loaded["groups"] else list(loaded["tasks"].values())
    with store.guarded(candidate.facts()):
        found = evaluator.simple_evaluate(
            model=lm,
            tasks=top,
            num_fewshot=spec.num_fewshot,
            limit=candidate.settings.limit,
            apply_chat_template=candidate.settings.chat_template,
            use_cache=store.responses(candidate.facts()),
            task_manager=manager,
        )
    return (
        None
        if found is None
        else plain_outcome(spec.name, found) | {"seconds": time.perf_counter() - started}
    )


def _load(manager: Any, spec: Spec) -> Any:
    """The tasks with their documents. Raises TextError where these cannot be had."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return manager.load([spec.name])
    except (OSError, DatasetGenerationError) as error:  # what datasets raises for the Hub is an OSError too
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        way = f"look at {spec.local}" if spec.local else "give a folder with a local copy by --data"
        raise TextError(f"the documents of task {spec.name} cannot be had: {reason[:200]}; {way}") from error


def _language_model(candidate: Candidate) -> Any:
    """lm-eval's face of the model, made once."""
    if candidate.lm is None:
        make = _served if candidate.settings.backend == "vllm" else _in_memory
        candidate.lm = make(candidate)
    return candidate.lm


def _in_memory(candidate: Candidate) -> Any:
    from .progress_model import WatchedLM

    opened = candidate.opened
    tokenizer = opened.tokenizer()
    if candidate.settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise MhconvertError(f"{opened.reference} has no chat template; leave out --chat-template")
    return WatchedLM(opened.model(candidate.dtype), tokenizer, candidate.settings.max_length)


def _served(candidate: Candidate) -> Any:
    """lm-eval's vllm model, which loads the checkpoint's folder itself."""
    from lm_eval.api.registry import get_model

    opened = candidate.opened
    if opened.adapter is not None or (opened.donor is not None and not opened.donor.model_files().is_dir()):
        raise MhconvertError(f"{opened.reference} is no folder that vllm loads; merge or export it first")
    place = str(opened.folder if opened.donor is None else opened.donor.model_files())
    arguments: dict[str, Any] = {"pretrained": place, "dtype": str(candidate.dtype).removeprefix("torch.")}
    arguments |= {"trust_remote_code": opened.donor is None or opened.trust_remote_code}
    if candidate.settings.max_length is not None:
        arguments |= {"max_model_len": candidate.settings.max_length}
    return get_model("vllm").create_from_arg_obj(
        arguments, {"batch_size": candidate.settings.batch_size or "auto"}
    )


def rank() -> int:
    """Of this process among those of `accelerate launch`; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _barrier(candidate: Candidate) -> None:
    """Wait for the other processes, so that none stores a result before all have looked for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _language_model(candidate).barrier()
