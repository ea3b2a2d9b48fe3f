"""`mhconvert eval`: a donor and models made from it, compared on texts, on lm-eval tasks and in retrieval."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import MhconvertError
from mhconvert.library_versions import versions
from mhconvert.progress import Listener, Progress

from ..convert import open_model
from ..convert.checkpoint import identity
from ..convert.checkpoint.provenance import read_record
from ..convert.open_model import OpenModel
from . import fidelity, retrieval, texts
from .result_cache import Store
from .settings import EvalSettings
from .tasks import harness, scores
from .tasks.harness import Candidate, OnRows
from .tasks.task_choice import resolve


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
    """The results of all models, the donor first: models, texts, cache, tasks, average, retrieval, settings, versions.

    Args:
        checkpoints: references of the models.
        settings: what is evaluated.
        against: the donor; by default the one that the first checkpoint was made from.
        device: by default CUDA where there is one.
        trust_remote_code: lets a checkpoint run its own code.
        on_progress: called with the progress.
        fresh: measures everything anew.
        store: keeps results between runs; what was finished before an error is not measured again.

    Raises:
        MhconvertError: a model cannot be read, or the models have different vocabularies.
    """
    started = time.perf_counter()
    harness.require_available(settings)
    store = store if store is not None else Store()
    with tempfile.TemporaryDirectory(prefix="mhconvert-tasks-") as folder:
        tasks = resolve(settings, Path(folder)) if settings.has_tasks else None
        opened = _open(
            checkpoints, settings, against, _process_device(device), trust_remote_code, on_progress
        )
        text_rows = _text_rows(settings, opened[0])
        for model in opened if text_rows else []:
            model.require_length(settings.sequence_length)
        candidates = [Candidate(model, open_model.of_model(model), settings) for model in opened]
        result: dict[str, Any] = {"models": [_identity(each) for each in candidates]}
        if harness.rank() == 0:
            result |= texts.measure(
                candidates, text_rows, store, fresh=fresh, on_rows=_row_listener(on_progress)
            )
        outcomes, probes = [], []
        for candidate in candidates:
            if tasks is not None:
                on_rows = _row_listener(on_progress, candidate)
                outcomes.append(harness.evaluate(candidate, tasks, store, fresh=fresh, on_rows=on_rows))
            if settings.retrieval and harness.rank() == 0:
                probes.append(_probe(candidate, fresh, store, on_progress))
            candidate.lm = None  # one model in memory at a time
    if harness.rank() != 0:
        return {}
    result |= {"tasks": [], "average": None, "retrieval": _retrieval(probes)}
    if tasks is not None:
        local = {spec.name: spec.local.name if spec.local else None for spec in tasks.specs}
        result["tasks"] = [
            scores.task_row(of_task, local[of_task[0]["name"]]) for of_task in zip(*outcomes, strict=True)
        ]
        result["average"] = scores.average(result["tasks"])
    on_progress(Progress("done", 1, 1))
    return result | {
        "settings": _recorded_settings(settings, candidates[0]),
        "versions": _versions(tasks is not None),
        "seconds": time.perf_counter() - started,
    }


def _text_rows(settings: EvalSettings, donor: OpenModel) -> dict[str, Tensor]:
    """Token ids of each text (sequences, sequence_length), by the file's name."""
    shape = (settings.sequence_length, settings.sequences)
    return {text.name: fidelity.text_rows(donor.tokenizer(), text, *shape) for text in settings.text_files}


def _process_device(device: str | None) -> str | None:
    """`device`, or under `accelerate launch` the GPU of this process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device is None and local is not None and torch.cuda.is_available() else device


def _open(
    checkpoints: Sequence[str],
    settings: EvalSettings,
    against: str | None,
    device: str | None,
    trust_remote_code: bool,
    on_progress: Listener,
) -> list[OpenModel]:
    """The donor, where there is one, and the checkpoints; no weights are read."""
    references = list(dict.fromkeys(checkpoints))
    if against is None:
        try:
            against = open_model.recorded_donor(references[0])
        except MhconvertError:
            if settings.text or len(references) > 1:
                raise
    references = ([against] if against is not None else []) + [each for each in references if each != against]
    models: list[OpenModel] = []
    for index, reference in enumerate(references):
        on_progress(Progress("donor" if index == 0 else "checkpoint", 0, 1, reference))
        opened = open_model.open_model(reference, device=device, trust_remote_code=trust_remote_code)
        if models and opened.vocab_size != models[0].vocab_size:
            raise MhconvertError(
                f"{reference} has {opened.vocab_size} tokens and {references[0]} has {models[0].vocab_size}; "
                "they can be compared only over one vocabulary"
            )
        models.append(opened)
    return models


def _identity(candidate: Candidate) -> dict[str, Any]:
    opened = candidate.opened
    role, method = "donor", identity.made_by(str(opened.folder))
    if opened.adapter is not None:
        role, method = "adapter", opened.adapter.method
    elif method is not None:
        role = "healed" if read_record(opened.folder).get("healed") else "converted"
    return {
        "name": candidate.name,
        "reference": opened.reference,
        "role": role,
        "method": method,
        "fingerprint": candidate.fingerprint,
        "dtype": str(candidate.dtype).removeprefix("torch."),
    }


def _probe(candidate: Candidate, fresh: bool, store: Store, on_progress: Listener) -> dict[str, Any]:
    """The retrieval results of one model, with the lengths left out because they exceed what it reads."""
    limit = getattr(candidate.opened.config.get_text_config(), "max_position_embeddings", None)
    lengths, left_out = retrieval.usable_lengths(limit, retrieval.LENGTHS)
    if not lengths:
        raise MhconvertError(
            f"{candidate.opened.reference} reads {limit} tokens, fewer than the shortest text of the retrieval probe "
            f"({min(retrieval.LENGTHS)}); leave out --retrieval"
        )
    key = candidate.key() | {"probe": lengths}
    result = None if fresh else store.load(key)
    if result is None:
        model = candidate.lm.model if candidate.lm is not None else candidate.opened.model(candidate.dtype)
        on_rows = _row_listener(on_progress, candidate)
        result = retrieval.probe(
            model,
            candidate.opened.tokenizer(),
            lengths=lengths,
            on_cell=lambda done, total: on_rows("retrieval", done, total),
        )
        store.save(key, result)
    return result | {"left_out": left_out}


def _retrieval(probes: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not probes:
        return None
    shared = {name: probes[0][name] for name in ("lengths", "depths", "trials", "left_out")}
    return shared | {"models": probes}


def _row_listener(on_progress: Listener, candidate: Candidate | None = None) -> OnRows:
    """Passes the rows done of a task on to `on_progress`, with the model's name in the message."""

    def on_rows(task: str, done: int, total: int) -> None:
        on_progress(Progress("tasks", done, total, f"{candidate.name}: {task}" if candidate else task))

    return on_rows


def _recorded_settings(settings: EvalSettings, first: Candidate) -> dict[str, Any]:
    return {
        "suite": settings.suite,
        "limit": settings.limit,
        "chat_template": settings.chat_template,
        "batch_size": first.batch_size(False),
        "max_length": settings.max_length,
        "backend": settings.backend,
        "device": first.opened.device,
    }


def _versions(tasks: bool) -> dict[str, str]:
    if not tasks:
        return versions()
    import lm_eval

    return versions() | {"lm_eval": lm_eval.__version__}
