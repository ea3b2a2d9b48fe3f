"""A model under evaluation: what it is, how it is run, and what its results are stored under."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...convert.open_model import OpenModel
from ..finite_logits import refuse_nan
from ..kv_cache import serving
from ..long_context import serving as long_context_serving
from ..long_context.plan import LongContext
from ..settings import OWN_CACHE, EvalSettings
from ..vllm.engine import installed

CPU_BATCH = 8  # lm-eval's own search starts with 64 rows of the maximal length, too much for a CPU's memory
ROLLING_BATCH = 1  # rows of the maximal length with the logits of every position


@dataclass
class Candidate:
    """A model under evaluation; its weights are read when the first task needs them.

    Attributes:
        opened: its config, tokenizer and files.
        fingerprint: of its files.
        settings: of the evaluation.
        kv_cache_dtype: of its cache.
        long_context: how it reads texts beyond its trained length; None: as it is.
        lm: lm-eval's wrapper of the loaded model; None before it is needed.
    """

    opened: OpenModel
    fingerprint: str
    settings: EvalSettings
    kv_cache_dtype: str = OWN_CACHE
    long_context: LongContext | None = None
    lm: Any = None

    @property
    def name(self) -> str:
        """The donor's name, the name of the folder, or that of the repository on the Hub; then how it reads longer
        texts, and the cache's dtype."""
        reading = [self.long_context.kind] if self.long_context else []
        cache = [self.kv_cache_dtype] if self.kv_cache_dtype != OWN_CACHE else []
        return " ".join((self._name, *reading, *cache))

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
            **self.backend_key(),
            "max_length": self.settings.max_length,
            "device": torch.device(self.opened.device).type,
            **self.cache_key(),
        }

    def backend_key(self) -> dict[str, Any]:
        """The part of a key that says what runs the tasks."""
        if self.settings.backend == "hf":
            return {"backend": "hf"}
        return {"backend": "vllm", "environment": installed(self.settings.python)}

    def cache_key(self) -> dict[str, Any]:
        """The part of a key that says which cache the model has and how it reads; {} for its own and as it is."""
        cache = {} if self.kv_cache_dtype == OWN_CACHE else {"kv_cache_dtype": self.kv_cache_dtype}
        return cache | (self.long_context.key() if self.long_context else {})

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model, with its cache and its way of reading."""
        model = long_context_serving.serve(self.opened.model(dtype), self.long_context)
        return serving.serve(refuse_nan(model, self.opened.reference), self.kv_cache_dtype)

    def model(self) -> Any:
        """The model in this process: that of lm-eval's wrapper, or else read anew, once one in vLLM is let go of, whose
        process holds the device's memory."""
        if self.settings.backend == "vllm":
            self.release()
        return self.lm.model if self.lm is not None else self.load(self.dtype)

    def batch_size(self, rolling: bool) -> int | str:
        """Rows per call of the model; `rolling`: in tasks with rows of the maximal length."""
        if self.settings.batch_size is not None:
            return self.settings.batch_size
        if torch.device(self.opened.device).type != "cpu":
            return "auto"
        return ROLLING_BATCH if rolling else CPU_BATCH

    def prompts_together(self, number: int) -> int:
        """How many prompts are continued in one batch: `number`, but one with a quantised cache, whose groups left
        padding would move."""
        return number if self.kv_cache_dtype == OWN_CACHE else 1

    def release(self) -> None:
        """Let go of the loaded model; one in vLLM ends with its process."""
        if self.lm is not None and self.settings.backend == "vllm":
            self.lm.engine.close()
        self.lm = None


class LazyModel:
    """A candidate whose model is loaded, in `dtype`, when it is first needed."""

    def __init__(self, candidate: Candidate, dtype: torch.dtype = torch.float32) -> None:
        self.candidate, self.dtype = candidate, dtype

    @cached_property
    def model(self) -> Any:
        return self.candidate.load(self.dtype)
