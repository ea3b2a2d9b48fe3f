"""Prefill and decode speed of models side by side; their repetitions alternate, so that drift meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ...convert.bare_process.child import cache_storage

WARM_STEPS = 2  # decode steps before the clock runs: allocations, and compilation
PREFILLS = 3
PATIENCE = 5.0  # seconds: a prefill that takes longer is not repeated, and re-expansion stops after so many
READ_AS_IT_IS = (
    "max_absorbed_tokens",
    "max_grouped_tokens",
)  # of an attention: query tokens that meet the cache unexpanded
FEWEST = 2  # steps that re-expansion is timed on, whatever they take


@dataclass(frozen=True)
class Load:
    """What is timed: `batch` rows decode `new_tokens` tokens each, and `context` tokens are cached after the last."""

    context: int
    batch: int
    new_tokens: int
    static_cache: bool = False
    compile: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens cached before the first decode step; below 1 where the context has no room for the steps."""
        return self.context - WARM_STEPS - self.new_tokens


class Run:
    """One model under one load, and its timings in seconds.

    absorb=False: latent attention expands the cache to keys and values of every head in every step, as
    transformers' own classes do.
    """

    def __init__(self, model: Any, load: Load, *, absorb: bool = True) -> None:
        self.model, self.load, self.absorb = model, load, absorb
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.row: Any = None
        self.cache: Any = None
        self._token = torch.ones(load.batch, 1, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def prefill(self) -> None:
        """Read the prompt as one row, timed; `row` is its cache."""
        self.row = None
        vocabulary = self.model.config.get_text_config().vocab_size
        prompt = (torch.arange(self.load.prompt_tokens, device=self.model.device) % vocabulary)[None]
        row = DynamicCache()
        options = {"past_key_values": row, "use_cache": True, "logits_to_keep": 1}
        self.prefills.append(seconds(lambda: self.model(input_ids=prompt, **options), self.model.device))
        self.row = row

    @torch.no_grad()
    def fill(self, row: Any) -> None:
        """Begin decoding with the cache `row` repeated for every row of the batch."""
        config, load = self.model.config, self.load
        self.cache = (
            StaticCache(config=config, max_cache_len=load.context)
            if load.static_cache
            else DynamicCache(config=config)
        )
        for index, layer in enumerate(row.layers):
            keys, values = (states.expand(load.batch, -1, -1, -1) for states in (layer.keys, layer.values))
            self.cache.update(keys, values, index)

    @torch.no_grad()
    def step(self, *, timed: bool = True) -> None:
        """One token for every row; the same one each time, as speed does not depend on it."""
        switch_absorption(self.model, self.absorb)
        call = self.model.get_compiled_call(None) if self.load.compile else self.model
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        taken = seconds(lambda: call(input_ids=self._token, **options), self.model.device)
        if timed:
            self.steps.append(taken)

    def finished(self) -> bool:
        """Whether every step is done, or re-expansion has used up its patience."""
        if len(self.steps) >= self.load.new_tokens:
            return True
        return not self.absorb and len(self.steps) >= FEWEST and sum(self.steps) > PATIENCE

    def prefill_speed(self) -> dict[str, Any]:
        """prefill_tokens_per_s of one row, from the median repetition."""
        return {"prefill_tokens_per_s": self.load.prompt_tokens / statistics.median(self.prefills)}

    def decode_speed(self) -> dict[str, Any]:
        """decode_tokens_per_s of the batch from the median step; step_seconds, that step; step_spread, the
        quartiles' distance as a share of it; steps, how many were timed.
        """
        median = statistics.median(self.steps)
        spread = 0.0
        if len(self.steps) > 1:
            first, _, third = statistics.quantiles(self.steps, n=4, method="inclusive")
            spread = (third - first) / median
        return {
            "decode_tokens_per_s": self.load.batch / median,
            "step_seconds": median,
            "step_spread": spread,
            "steps": len(self.steps),
        }

    def cache_size(self) -> dict[str, Any]:
        """cache_bytes, weighed on the cache object, and cache_tokens, all rows together."""
        tokens = int(self.cache.get_seq_length()) * self.load.batch
        return {"cache_bytes": cache_storage(self.cache)[0], "cache_tokens": tokens}


def compare(
    donor: Any,
    converted: Any,
    load: Load,
    *,
    reexpand: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One row of the table: context, donor {…}, converted {…}, ratio, cache_ratio; reexpanded {…}, if wanted, and
    ratio_to_reexpanded. Ratios are of decode tokens/s and of cache bytes, converted ÷ the other.

    donor and converted are causal language models in eval mode. on_step hears of every decode step of the donor.
    """
    if load.compile:
        torch.compiler.reset()  # what another context has left would make this one's shapes dynamic
    runs = {"donor": Run(donor, load), "converted": Run(converted, load)}
    for repetition in range(PREFILLS):
        if repetition and max(run.prefills[0] for run in runs.values()) > PATIENCE:
            break
        for run in runs.values():
            run.prefill()
    if reexpand:
        runs["reexpanded"] = Run(converted, load, absorb=False)
        runs["reexpanded"].row = runs["converted"].row
    for run in runs.values():
        run.fill(run.row)
    for run in runs.values():
        run.row = None
    try:
        _decode(list(runs.values()), load, on_step)
    finally:
        switch_absorption(converted, True)
    row: dict[str, Any] = {"context": load.context}
    for name in ("donor", "converted"):
        row[name] = runs[name].prefill_speed() | runs[name].decode_speed() | runs[name].cache_size()
    row["ratio"] = row["converted"]["decode_tokens_per_s"] / row["donor"]["decode_tokens_per_s"]
    row["cache_ratio"] = row["converted"]["cache_bytes"] / row["donor"]["cache_bytes"]
    if reexpand:
        slow = row["reexpanded"] = runs["reexpanded"].decode_speed()
        row["ratio_to_reexpanded"] = row["converted"]["decode_tokens_per_s"] / slow["decode_tokens_per_s"]
    return row


def _decode(runs: list[Run], load: Load, on_step: Callable[[], None]) -> None:
    for _ in range(WARM_STEPS):
        for run in runs:
            run.step(timed=False)
    for _ in range(load.new_tokens):
        for run in runs:
            if not run.finished():
                run.step()
        on_step()


def switch_absorption(model: Any, on: bool) -> None:
    """Let every converted attention in `model` read its cache as it is, or make it expand it each time."""
    for module in model.modules():
        for name in READ_AS_IT_IS:
            if hasattr(type(module), name):
                setattr(module, name, getattr(type(module), name) if on else 0)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `work`, the device's queue empty before and after."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
