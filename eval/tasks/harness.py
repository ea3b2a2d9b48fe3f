"""EleutherAI's lm-evaluation-harness on a model that `open_model` opened: one task at a time, with stored results.

Questions, scores and standard errors are lm-eval's (`simple_evaluate`); this module gives it a model and stores its
results.
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
from ..finite_logits import refuse_nan, refuse_nan_scores
from ..kv_cache import serving
from ..result_cache import Store
from ..settings import OWN_CACHE, EvalSettings
from .outcome import plain_outcome
from .task_choice import TaskSet, TaskSpec

CPU_BATCH = 8  # lm-eval's own search starts with 64 rows of the maximal length, too much for a CPU's memory
ROLLING_BATCH = 1  # rows of the maximal length with the logits of every position

OnRows = Callable[[str, int, int], None]  # task, rows done, rows in all


def require_available(settings: EvalSettings) -> None:
    """Raises MhconvertError for a backend that is not installed, or has no such cache."""
    if settings.backend == "vllm" and settings.kv_cache_dtype not in (OWN_CACHE, "fp8"):
        raise MhconvertError(
            f"vllm has no KV cache of dtype {settings.kv_cache_dtype}; choose --kv-cache-dtype fp8, or --backend hf"
        )
    if settings.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MhconvertError("--backend vllm needs vllm, which is not installed here; use --backend hf")


@dataclass
class Candidate:
    """A model under evaluation; its weights are read when the first task needs them.

    Attributes:
        opened: its config, tokenizer and files.
        fingerprint: of its files.
        settings: of the evaluation.
        kv_cache_dtype: of its cache.
        lm: lm-eval's wrapper of the loaded model; None before it is needed.
    """

    opened: OpenModel
    fingerprint: str
    settings: EvalSettings
    kv_cache_dtype: str = OWN_CACHE
    lm: Any = None

    @property
    def name(self) -> str:
        """The donor's name, the name of the folder, or that of the repository on the Hub; then the cache's dtype."""
        return self._name if self.kv_cache_dtype == OWN_CACHE else f"{self._name} {self.kv_cache_dtype}"

    @property
    def _name(self) -> str:
        if self.opened.donor is not None and self.opened.adapter is None:
            return self.opened.donor.name
        if self.opened.folder == Path(self.opened.reference).expanduser():
            return self.opened.folder.resolve().name
        return self.opened.reference.partition("@")[0].rpartition("/")[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the settings, or that of the stored weights."""
        if self.settings.dtype is not None:
            return getattr(torch, self.settings.dtype)
        if self.opened.donor is not None:
            return self.opened.donor.dtype
        stated = getattr(self.opened.config, "dtype", None) or torch.float32
        return getattr(torch, stated) if isinstance(stated, str) else stated

    def key(self) -> dict[str, Any]:
        """Everything except the question on which a response depends."""
        return {
            "model": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.settings.backend,
            "max_length": self.settings.max_length,
            "device": torch.device(self.opened.device).type,
            **self.cache_key(),
        }

    def cache_key(self) -> dict[str, str]:
        """The part of a key that says which cache the model has; {} for its own."""
        return {} if self.kv_cache_dtype == OWN_CACHE else {"kv_cache_dtype": self.kv_cache_dtype}

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model, with its cache."""
        return serving.serve(refuse_nan(self.opened.model(dtype), self.opened.reference), self.kv_cache_dtype)

    def batch_size(self, rolling: bool) -> int | str:
        """Rows per call of the model; `rolling`: in tasks with rows of the maximal length."""
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
        store.forget_responses(candidate.key())
    _barrier(candidate)
    for index, spec in enumerate(tasks.specs):
        if outcomes[index] is None:
            outcomes[index] = _evaluate_task(candidate, spec, tasks.manager, store, on_rows)
            if outcomes[index] is not None:
                store.save(keys[index], outcomes[index])
    return [outcome for outcome in outcomes if outcome is not None] if rank() == 0 else []


def _task_key(candidate: Candidate, spec: TaskSpec) -> dict[str, Any]:
    """Everything on which the outcome of a task depends."""
    settings = candidate.settings
    return candidate.key() | {
        "task": spec.name,
        "digest": spec.digest,
        "num_fewshot": spec.num_fewshot,
        "limit": settings.limit,
        "chat_template": settings.chat_template,
    }


def _evaluate_task(
    candidate: Candidate, spec: TaskSpec, manager: Any, store: Store, on_rows: OnRows
) -> dict[str, Any] | None:
    """The outcome of one task; None in processes other than the first."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # of the working directory, where git may print errors
    started = time.perf_counter()
    loaded = _load_documents(manager, spec)
    lm = _language_model(candidate)
    rolling = any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in loaded["tasks"].values())
    if candidate.settings.backend == "hf":
        lm.batch_size_per_gpu = candidate.batch_size(rolling)
        lm.on_rows = lambda done, total: on_rows(spec.name, done, total)
    group = loaded["groups"].get(spec.name)
    with store.database_errors(candidate.key()):
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=list(loaded["tasks"].values()) if group is None else [group],
            num_fewshot=spec.num_fewshot,
            limit=candidate.settings.limit,
            apply_chat_template=candidate.settings.chat_template,
            use_cache=store.responses(candidate.key()),
            task_manager=manager,
        )
    if results is None:
        return None
    return plain_outcome(spec.name, results) | {"seconds": time.perf_counter() - started}


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


def _language_model(candidate: Candidate) -> Any:
    """lm-eval's wrapper of the model, made when it is first needed."""
    if candidate.lm is None:
        make = _vllm_model if candidate.settings.backend == "vllm" else _hf_model
        candidate.lm = make(candidate)
    return candidate.lm


def _hf_model(candidate: Candidate) -> Any:
    from .progress_model import ProgressLM

    opened = candidate.opened
    tokenizer = opened.tokenizer()
    if candidate.settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise MhconvertError(f"{opened.reference} has no chat template; leave out --chat-template")
    return ProgressLM(candidate.load(candidate.dtype), tokenizer, candidate.settings.max_length)


def _vllm_model(candidate: Candidate) -> Any:
    """lm-eval's wrapper of vLLM, which loads the checkpoint's folder itself."""
    from lm_eval.api.registry import get_model

    opened = candidate.opened
    if opened.adapter is not None or (opened.donor is not None and not opened.donor.model_files().is_dir()):
        raise MhconvertError(f"{opened.reference} is no folder that vllm loads; merge or export it first")
    folder = str(opened.folder if opened.donor is None else opened.donor.model_files())
    arguments: dict[str, Any] = {"pretrained": folder, "dtype": str(candidate.dtype).removeprefix("torch.")}
    arguments |= {"trust_remote_code": opened.donor is None or opened.trust_remote_code}
    if candidate.kv_cache_dtype != OWN_CACHE:
        arguments |= {"kv_cache_dtype": candidate.kv_cache_dtype}
    if candidate.settings.max_length is not None:
        arguments |= {"max_model_len": candidate.settings.max_length}
    rows = {"batch_size": candidate.settings.batch_size or "auto"}
    lm = get_model("vllm").create_from_arg_obj(arguments, rows)
    return refuse_nan_scores(lm, opened.reference, candidate.dtype)


def rank() -> int:
    """The rank of this process under `accelerate launch`; otherwise 0."""
    return int(os.environ.get("RANK", "0"))


def _barrier(candidate: Candidate) -> None:
    """Returns when all processes have read the store, so that they agree on which tasks to run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _language_model(candidate).barrier()
