"""Prefill and decode speed of models. Their repetitions alternate, so that drift of the machine affects all alike."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ...convert.bare_process.child import cache_storage
from ..kv_cache.serving import make_cache
from ..settings import OWN_CACHE
from .memory import peak_bytes

WARM_STEPS = (
    4  # untimed decode steps: for allocations and compilation, two for the memory of one, and after them
)
PREFILLS = 3
TIME_LIMIT = (
    5.0  # seconds: a prefill that takes longer is not repeated; re-expanding decode steps end after it
)
MIN_REEXPANDED_STEPS = 2  # re-expanding decode steps that are timed even beyond the limit
# Of the converted model's figure to the donor's.
RATIOS = {
    "ratio": "decode_tokens_per_s",
    "prefill_ratio": "prefill_tokens_per_s",
    "cache_ratio": "cache_bytes",
}
# Attributes of attention classes: the most query tokens for which the cache is read without expanding it.
ABSORPTION_LIMITS = ("max_absorbed_tokens", "max_grouped_tokens")


@dataclass(frozen=True)
class Load:
    """A workload: `batch` rows do `new_tokens` decode steps, after which every row has `context` cached tokens.

    Attributes:
        step_tokens: that a row reads in a step: 1, or a token and the drafted ones that assisted decoding verifies.
        chunk_tokens: the prompt is read in pieces of so many; None: at once.
    """

    context: int
    batch: int
    new_tokens: int
    static_cache: bool = False
    compile: bool = False
    step_tokens: int = 1
    chunk_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens cached before the first decode step; below 1 if the context is too short for the steps."""
        return self.context - self.step_tokens * (WARM_STEPS + self.new_tokens)


class Run:
    """One model under one load.

    Args:
        absorb: False makes latent attention expand its cache to the keys and values of all heads in every step, as
            the classes in transformers do.
        kv_cache_dtype: of the cache.

    Attributes:
        prefills, steps: timings in seconds.
        step_memory: bytes that a step has at most beside weights and the cache before it; None: not known here.
        row: cache of one row after the prefill.
        cache: of the batch.
    """

    def __init__(
        self, model: Any, load: Load, *, absorb: bool = True, kv_cache_dtype: str = OWN_CACHE
    ) -> None:
        self.model, self.load, self.absorb, self.kv_cache_dtype = model, load, absorb, kv_cache_dtype
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.step_memory: int | None = None
        self.row: Any = None
        self.cache: Any = None
        self._token = torch.ones(load.batch, load.step_tokens, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def prefill(self) -> None:
        """Run and time the prefill of one row; its cache becomes `row`."""
        self.row = None
        vocabulary = self.model.config.get_text_config().vocab_size
        prompt = (torch.arange(self.load.prompt_tokens, device=self.model.device) % vocabulary)[None]
        coded = self.kv_cache_dtype != OWN_CACHE
        row = make_cache(self.model.config, self.kv_cache_dtype) if coded else DynamicCache()
        options = {"past_key_values": row, "use_cache": True, "logits_to_keep": 1}
        pieces = prompt.split(self.load.chunk_tokens or prompt.shape[1], dim=1)

        def read() -> None:
            for piece in pieces:
                self.model(input_ids=piece, **options)

        self.prefills.append(seconds(read, self.model.device))
        self.row = row

    @torch.no_grad()
    def fill(self, row: Any) -> None:
        """Fill the batch's cache with the one-row cache `row`, repeated."""
        config, load = self.model.config, self.load
        if self.kv_cache_dtype != OWN_CACHE:
            self.cache = copy.deepcopy(row)
            self.cache.batch_repeat_interleave(load.batch)
            return
        fixed = load.static_cache
        self.cache = StaticCache(config, load.context) if fixed else DynamicCache(config=config)
        for index, layer in enumerate(row.layers):
            keys, values = (states.expand(load.batch, -1, -1, -1) for states in (layer.keys, layer.values))
            self.cache.update(keys, values, index)

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token (or `step_tokens`) in every row: always the same, as speed does not depend on it."""
        call = self.model.get_compiled_call(None) if self.load.compile else self.model
        call(input_ids=self._token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def finished(self) -> bool:
        """Whether all steps are done, or re-expansion has used up its time limit."""
        if len(self.steps) >= self.load.new_tokens:
            return True
        return not self.absorb and len(self.steps) >= MIN_REEXPANDED_STEPS and sum(self.steps) > TIME_LIMIT

    def figures(self) -> dict[str, Any]:
        """What was measured; without prefill and cache of a run that shares them with another."""
        if not self.prefills:
            return self.decode_speed()
        prefill = self.load.prompt_tokens / statistics.median(self.prefills)
        return {"prefill_tokens_per_s": prefill} | self.decode_speed() | self.cache_size()

    def decode_speed(self) -> dict[str, Any]:
        """The decode speed of the batch.

        Returns decode_tokens_per_s and step_seconds (both from the median step), step_spread (interquartile range
        over the median), steps (their number) and step_memory_bytes.
        """
        median = statistics.median(self.steps)
        spread = 0.0
        if len(self.steps) > 1:
            first, _, third = statistics.quantiles(self.steps, n=4, method="inclusive")
            spread = (third - first) / median
        return {
            "decode_tokens_per_s": self.load.batch * self.load.step_tokens / median,
            "step_seconds": median,
            "step_spread": spread,
            "steps": len(self.steps),
            "step_memory_bytes": self.step_memory,
        }

    def cache_size(self) -> dict[str, Any]:
        """`cache_bytes`, measured on the cache object, and `cache_tokens`, both over all rows."""
        tokens = int(self.cache.get_seq_length()) * self.load.batch
        return {"cache_bytes": cache_storage(self.cache)[0], "cache_tokens": tokens}


def compare(
    donor: Any,
    converted: Any,
    load: Load,
    *,
    reexpand: bool = False,
    kv_cache_dtype: str = OWN_CACHE,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The timings of two models under one load, one row of the benchmark's table.

    Args:
        donor, converted: causal language models in eval mode.
        reexpand: also time the converted model without absorption.
        kv_cache_dtype: of the converted model's cache; the donor has its own.
        on_step: called after every timed decode step of the donor.

    Returns context, donor {…}, converted {…}, and ratio (decode tokens/s), prefill_ratio and cache_ratio (bytes),
    converted ÷ donor; with `reexpand` also reexpanded {…} and ratio_to_reexpanded (decode tokens/s, converted ÷
    re-expanded).
    """
    if load.compile:
        torch.compiler.reset()  # otherwise torch.compile would make the shapes dynamic from the second context on
    runs = {"donor": Run(donor, load), "converted": Run(converted, load, kv_cache_dtype=kv_cache_dtype)}
    for repetition in range(PREFILLS):
        if repetition and max(run.prefills[0] for run in runs.values()) > TIME_LIMIT:
            break
        for run in runs.values():
            run.prefill()
    if reexpand:
        runs["reexpanded"] = Run(converted, load, absorb=False, kv_cache_dtype=kv_cache_dtype)
        runs["reexpanded"].row = runs["converted"].row
    for run in runs.values():
        run.fill(run.row)
    for run in runs.values():
        run.row = None
    try:
        _decode(list(runs.values()), load, on_step)
    finally:
        switch_absorption(converted, True)
    row: dict[str, Any] = {"context": load.context} | {name: run.figures() for name, run in runs.items()}
    for name, figure in RATIOS.items():
        row[name] = row["converted"][figure] / row["donor"][figure]
    if reexpand:
        speeds = [row[name]["decode_tokens_per_s"] for name in ("converted", "reexpanded")]
        row["ratio_to_reexpanded"] = speeds[0] / speeds[1]
    return row


def _decode(runs: list[Run], load: Load, on_step: Callable[[], None]) -> None:
    """Run the warm-up steps and the timed steps of all runs, alternating between them."""
    for run in runs:
        switch_absorption(run.model, run.absorb)
        run.step_memory = peak_bytes(run.step, run.model.device, load.compile)
    for run in runs:
        switch_absorption(run.model, run.absorb)
        run.step()
    for _ in range(load.new_tokens):
        for run in runs:
            if not run.finished():
                switch_absorption(run.model, run.absorb)
                run.steps.append(seconds(run.step, run.model.device))
        on_step()


def switch_absorption(model: Any, on: bool) -> None:
    """Switch absorption in every attention of `model` that has it: read the cache as it is, or expand it each step."""
    for module in model.modules():
        for name in ABSORPTION_LIMITS:
            if hasattr(type(module), name):
                setattr(module, name, getattr(type(module), name) if on else 0)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `work` in seconds, with the device synchronised before and after."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
