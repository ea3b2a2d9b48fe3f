"""`mhconvert eval` from top to bottom: a donor and what was made from it, on texts, on tasks and on needles."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
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
from .tasks.harness import Candidate
from .tasks.task_choice import resolve


def run(
    checkpoints: Sequence[str],
    settings: EvalSettings,
    *,
    against: str | None,
    device: str | None,
    trust_remote_code: bool,
    tell: Listener,
    fresh: bool = False,
    store: Store | None = None,
) -> dict[str, Any]:
    """Every model's figures, the donor's first: models, texts, cache, tasks, average, retrieval, settings, versions.

    Raises MhconvertError; nothing that was finished before it is measured again by the next run.
    """
    started = time.perf_counter()
    harness.require_available(settings)
    store = store if store is not None else Store()
    with tempfile.TemporaryDirectory(prefix="mhconvert-tasks-") as folder:
        tasks = resolve(settings, Path(folder)) if settings.has_tasks else None
        opened = _open(checkpoints, settings, against, _place(device), trust_remote_code, tell)
        rows_of = _rows(settings, opened[0])
        for model in opened if rows_of else []:
            model.require_length(settings.sequence_length)
        candidates = [Candidate(model, open_model.of_model(model), settings) for model in opened]
        result: dict[str, Any] = {"models": [_identity(each) for each in candidates]}
        if harness.rank() == 0:
            result |= texts.compare(candidates, rows_of, store, fresh=fresh, on_rows=_listener(tell))
        rows, probes = [], []
        for candidate in candidates:
            if tasks is not None:
                told = _listener(tell, candidate)
                rows.append(harness.evaluate(candidate, tasks, store, fresh=fresh, on_rows=told))
            if settings.retrieval and harness.rank() == 0:
                probes.append(_probe(candidate, fresh, store, tell))
            candidate.lm = None  # one model in memory at a time
    if harness.rank() != 0:
        return {}
    result |= {"tasks": [], "average": None, "retrieval": _retrieval(probes)}
    if tasks is not None:
        local = {spec.name: spec.local.name if spec.local else None for spec in tasks.specs}
        result["tasks"] = [
            scores.task_row(outcomes, local[outcomes[0]["name"]]) for outcomes in zip(*rows, strict=True)
        ]
        result["average"] = scores.average(result["tasks"])
    tell(Progress("done", 1, 1))
    return result | {
        "settings": _settings(settings, candidates[0]),
        "versions": _versions(tasks is not None),
        "seconds": time.perf_counter() - started,
    }


def _rows(settings: EvalSettings, donor: OpenModel) -> dict[str, Tensor]:
    """The rows of each text (sequences, sequence_length), by the file's name."""
    shape = (settings.sequence_length, settings.sequences)
    return {text.name: fidelity.text_rows(donor.tokenizer(), text, *shape) for text in settings.text_files}


def _place(device: str | None) -> str | None:
    """Under `accelerate launch` each process has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device is None and local is not None and torch.cuda.is_available() else device


def _open(
    checkpoints: Sequence[str],
    settings: EvalSettings,
    against: str | None,
    device: str | None,
    trust: bool,
    tell: Listener,
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
    found: list[OpenModel] = []
    for index, reference in enumerate(references):
        tell(Progress("donor" if index == 0 else "checkpoint", 0, 1, reference))
        opened = open_model.open_model(reference, device=device, trust_remote_code=trust)
        if found and opened.vocab_size != found[0].vocab_size:
            raise MhconvertError(
                f"{reference} has {opened.vocab_size} tokens and {references[0]} has {found[0].vocab_size}; "
                "they can be compared only over one vocabulary"
            )
        found.append(opened)
    return found


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


def _probe(candidate: Candidate, fresh: bool, store: Store, tell: Listener) -> dict[str, Any]:
    """What the needle test says of one model, and which lengths are more than it reads."""
    limit = getattr(candidate.opened.config.get_text_config(), "max_position_embeddings", None)
    lengths, left_out = retrieval.usable_lengths(limit, retrieval.LENGTHS)
    if not lengths:
        raise MhconvertError(
            f"{candidate.opened.reference} reads {limit} tokens, fewer than the shortest text of the retrieval probe "
            f"({min(retrieval.LENGTHS)}); leave out --retrieval"
        )
    facts = candidate.facts() | {"probe": lengths}
    found = None if fresh else store.load(facts)
    if found is None:
        model = candidate.lm.model if candidate.lm is not None else candidate.opened.model(candidate.dtype)
        told = _listener(tell, candidate)
        found = retrieval.probe(
            model,
            candidate.opened.tokenizer(),
            lengths=lengths,
            on_cell=lambda done, total: told("retrieval", done, total),
        )
        store.save(facts, found)
    return found | {"left_out": left_out}


def _retrieval(probes: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not probes:
        return None
    shared = {name: probes[0][name] for name in ("lengths", "depths", "trials", "left_out")}
    return shared | {"models": probes}


def _listener(tell: Listener, candidate: Candidate | None = None) -> Callable[[str, int, int], None]:
    """How far a task is, as progress; the message says whose it is."""

    def on_rows(task: str, done: int, total: int) -> None:
        tell(Progress("tasks", done, total, f"{candidate.name}: {task}" if candidate else task))

    return on_rows


def _settings(settings: EvalSettings, first: Candidate) -> dict[str, Any]:
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
