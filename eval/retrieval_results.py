"""Retrieval of the models of an evaluation: each one's results, stored between runs, and all of them together."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import MhconvertError

from . import retrieval
from .result_cache import Store
from .tasks.candidate import Candidate
from .tasks.harness import OnRows


def probe(candidate: Candidate, fresh: bool, store: Store, on_rows: OnRows) -> dict[str, Any]:
    """The retrieval results of one model, with the lengths left out because they exceed what it reads.

    Raises MhconvertError where that is fewer than the shortest length.
    """
    asked, beyond = candidate.settings.retrieval_lengths, candidate.settings.long_context is not None
    own_limit = getattr(candidate.opened.config.get_text_config(), "max_position_embeddings", None)
    limit = None if beyond else own_limit
    lengths, left_out = retrieval.usable_lengths(limit, asked)
    if not lengths:
        raise MhconvertError(
            f"{candidate.opened.reference} reads {limit} tokens, fewer than the shortest text of the retrieval probe "
            f"({min(asked)}); leave out --retrieval, or name shorter --retrieval-lengths"
        )
    trials, depths = candidate.settings.retrieval_trials, candidate.settings.retrieval_depths
    key = candidate.key() | {"probe": lengths, "depths": depths, "trials": trials}
    result = None if fresh else store.load(key)
    if result is None:
        result = retrieval.probe(
            candidate.model(),
            candidate.opened.tokenizer(),
            lengths=lengths,
            depths=depths,
            trials=trials,
            beyond=beyond,
            on_cell=lambda done, total: on_rows("retrieval", done, total),
        )
        store.save(key, result)
    return result | {"left_out": left_out}


def table(probes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What all models were probed with, and models, with each one's results; None without probes."""
    if not probes:
        return None
    shared = {name: probes[0][name] for name in ("lengths", "depths", "trials", "left_out")}
    return shared | {"models": probes}
