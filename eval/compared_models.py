"""The models of an evaluation: a donor and what was made from it, opened over one vocabulary."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress

from ..convert import open_model
from ..convert.checkpoint import identity
from ..convert.checkpoint.provenance import read_record
from ..convert.open_model import OpenModel
from .kv_cache import serving
from .long_context.plan import plan
from .settings import OWN_CACHE, EvalSettings
from .tasks.candidate import Candidate


def open_models(
    checkpoints: Sequence[str],
    against: str | None,
    need_donor: bool,
    device: str | None,
    trust_remote_code: bool,
    on_progress: Listener,
    kv_cache_dtype: str = OWN_CACHE,
    beside_itself: bool = False,
) -> list[OpenModel]:
    """The donor, where there is one, and the checkpoints, each once; no weights are read.

    Args:
        checkpoints: references of the models.
        against: the donor; None: the one that the first checkpoint was made from.
        need_donor: whether a checkpoint alone is refused when it names no donor.
        device: None: under `accelerate launch` the GPU of this process, else CUDA where there is one.
        trust_remote_code, on_progress: lets a checkpoint run its own code; called with the progress.
        kv_cache_dtype: of the checkpoints' caches.
        beside_itself: as with a cache not their own, the donor may be among them, and one without a donor is its own.

    Raises MhconvertError for a model that cannot be read, or has no such cache or another vocabulary than the others.
    """
    device, references = _process_device(device), list(dict.fromkeys(checkpoints))
    beside_itself = beside_itself or kv_cache_dtype != OWN_CACHE
    if against is None:
        try:
            against = open_model.recorded_donor(references[0])
        except MhconvertError:
            if beside_itself:
                against = references[0]
            elif need_donor or len(references) > 1:
                raise
    if not beside_itself:
        references = [each for each in references if each != against]
    references = ([against] if against is not None else []) + references
    models: list[OpenModel] = []
    for index, reference in enumerate(references):
        on_progress(Progress("donor" if index == 0 else "checkpoint", 0, 1, reference))
        opened = open_model.open_model(reference, device=device, trust_remote_code=trust_remote_code)
        if models and opened.vocab_size != models[0].vocab_size:
            raise MhconvertError(
                f"{reference} has {opened.vocab_size} tokens and {references[0]} has {models[0].vocab_size}; "
                "they can be compared only over one vocabulary"
            )
        if index > 0:
            serving.require(opened, kv_cache_dtype)
        opened.require_tokenizer()
        models.append(opened)
    return models


def candidates_of(opened: Sequence[OpenModel], settings: EvalSettings) -> list[Candidate]:
    """The models of `open_models` with the caches and the ways of reading that they are measured with: the first, the
    donor, is as it is."""
    rows = [settings.sequence_length] if settings.text else []
    longest = max(rows + list(settings.retrieval_lengths if settings.retrieval else ()), default=0)
    plans = [plan(model, settings, longest) for model in opened[1:]]  # which refuse before weights are hashed
    donor, *others = ((model, open_model.of_model(model), settings) for model in opened)
    how = [(settings.kv_cache_dtype, each) for each in plans]
    return [Candidate(*donor), *(Candidate(*model, *own) for model, own in zip(others, how, strict=True))]


def describe(candidate: Candidate) -> dict[str, Any]:
    """name, reference, role (donor, converted, healed, adapter), method, fingerprint, dtype, cache, way of reading."""
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
        "kv_cache_dtype": candidate.kv_cache_dtype,
        "long_context": candidate.long_context.kind if candidate.long_context else None,
    }


def _process_device(device: str | None) -> str | None:
    """`device`, or under `accelerate launch` the GPU of this process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device is None and local is not None and torch.cuda.is_available() else device
