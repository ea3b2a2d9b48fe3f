"""Benchmark of a converted model against its donor. Loads that cannot be timed are refused before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mhconvert.device import pick_device
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress, ignore

from ...convert.checkpoint.identity import made_by
from ...convert.methods.registry import build_method, register, settings_class
from ...convert.open_model import OpenModel, open_model, recorded_donor
from ...convert.storage.dtype_cast import DTYPES
from ...convert.validation.option import declared
from ..kv_cache import serving
from ..report.units import size
from ..settings import OWN_CACHE
from . import speed
from .memory import available_memory
from .memory_estimate import memory_needed, step_bytes
from .random_models import random_model

MUST_AGREE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Options:
    """The settings of a benchmark.

    Attributes:
        contexts: cached tokens per row at the last decode step; one load each.
        batch: rows.
        new_tokens: timed decode steps.
        dtype: of weights and cache; None for bfloat16 on CUDA and float32 elsewhere.
        static_cache: use transformers' static cache.
        compile: compile the decode step with torch.compile; implies the static cache.
        reexpand: also time the converted model without absorption.
        kv_cache_dtype: of the converted model's cache; the donor has its own.
        step_tokens: tokens that a row reads in a step, as assisted decoding verifies drafted ones.
        chunk_tokens: the prompt is read in pieces of so many tokens; None: at once.

    Raises:
        MhconvertError: a setting is out of range, or a context is too short for the decode steps.
    """

    contexts: Sequence[int] = (512, 2048, 8192)
    batch: int = 8
    new_tokens: int = 16
    dtype: str | None = None
    static_cache: bool = False
    compile: bool = False
    reexpand: bool = False
    kv_cache_dtype: str = OWN_CACHE
    step_tokens: int = 1
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        counts = (self.batch, self.new_tokens, self.step_tokens, self.chunk_tokens or 1)
        if min(counts) < 1 or self.chunk_tokens == 0 or not self.contexts:
            raise MhconvertError(
                "--batch, --new-tokens, --step-tokens and --chunk-tokens start at 1; --contexts names one context or "
                "more"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise MhconvertError(f"dtype '{self.dtype}' is not one of {', '.join(DTYPES)}")
        if self.kv_cache_dtype != OWN_CACHE and (self.static_cache or self.compile):
            raise MhconvertError(
                f"{self.kv_cache_dtype} caches grow; no --static-cache or --compile with them"
            )
        for load in self.loads():
            if load.prompt_tokens < 1:
                raise MhconvertError(
                    f"a context of {load.context} tokens has no room for {speed.WARM_STEPS} + {self.new_tokens} "
                    f"steps of {self.step_tokens}; use more than {load.context - load.prompt_tokens}, or fewer "
                    "--new-tokens or --step-tokens"
                )

    def loads(self) -> list[speed.Load]:
        """The loads to time, one for each context, shortest first."""
        static = self.static_cache or self.compile
        how = (self.batch, self.new_tokens, static, self.compile, self.step_tokens, self.chunk_tokens)
        return [speed.Load(context, *how) for context in sorted(set(self.contexts))]


def bench(
    checkpoint: str, against: str | None, options: Options, device: str | None, on_progress: Listener = ignore
) -> dict[str, Any]:
    """The timings of the checkpoint in the folder `checkpoint` and of a donor, which may be itself with another cache.

    Args:
        against: reference of the donor; None for the one that the checkpoint was made from, or itself.
        device: None for CUDA if present, else the CPU.

    Raises:
        MhconvertError: `checkpoint` was not written by mhconvert, the shapes of the two models differ, or memory is
            too small.
    """
    place = pick_device(device)
    if made_by(checkpoint) is None and options.kv_cache_dtype == OWN_CACHE:
        raise MhconvertError(
            f"{checkpoint} is no folder that mhconvert wrote; convert it first, or time its shape with --random"
        )
    if options.reexpand and made_by(checkpoint) != "mla":
        raise MhconvertError(
            f"--reexpand is of mla, whose latent can be expanded; {checkpoint} has none: leave it out"
        )
    against = against or (checkpoint if made_by(checkpoint) is None else recorded_donor(checkpoint))
    on_progress(Progress("donor", 0, 1, against))
    donor, converted = (open_model(reference, device=str(place)) for reference in (against, checkpoint))
    for model in (donor, converted):
        model.require_tokenizer()
    for field in MUST_AGREE:
        own, other = (getattr(model.config.get_text_config(), field) for model in (converted, donor))
        if own != other:
            raise MhconvertError(
                f"{checkpoint} has {field} {own} and {against} has {other}; --against wants a donor of its shape"
            )
    dtype = _dtype(options, place)
    _require(donor, converted, options, dtype, place)
    inputs = {"checkpoint": checkpoint, "against": against}
    return inputs | _time(donor.model(dtype), converted.model(dtype), options, on_progress)


def bench_random(
    reference: str,
    method: str,
    kv_budget: float | None,
    options: Options,
    device: str | None,
    on_progress: Listener = ignore,
    kv_bits: str | int | None = None,
) -> dict[str, Any]:
    """The timings of randomly initialised models in the shape of a donor and of its conversion.

    Args:
        reference: the donor, of which only the config is read.
        kv_budget, kv_bits: None for the method's defaults.
        device: None for CUDA if present, else the CPU.

    Raises:
        MhconvertError: `reference` is a converted model, the method has no kv_bits, or memory is too small.
    """
    place = pick_device(device)
    donor = open_model(reference, device=str(place))
    if donor.donor is None:
        raise MhconvertError(f"{reference} is converted already; --random takes the donor's shape")
    kind = settings_class(method)
    if kv_bits is not None and "kv_bits" not in declared(kind):
        raise MhconvertError(f"kv_bits does not apply to {method}; leave it out")
    settings = kind() if kv_bits is None else kind(kv_bits=kv_bits)
    if kv_budget is not None:
        settings = settings.at_budget(kv_budget)
    converter = build_method(method, donor.config, settings, "quick")
    register(method)
    converted = OpenModel(f"{reference} ({method})", converter.example_config(), str(place), None)
    dtype = _dtype(options, place)
    _require(donor, converted, options, dtype, place)
    models = [random_model(model.config, dtype, place) for model in (donor, converted)]
    inputs = {"checkpoint": None, "against": reference, "random": method}
    return inputs | _time(models[0], models[1], options, on_progress)


def _require(
    donor: OpenModel, converted: OpenModel, options: Options, dtype: torch.dtype, device: torch.device
) -> None:
    """Check that the models can read the longest context and that memory suffices.

    Raises:
        MhconvertError: one of them does not hold.
    """
    serving.require(converted, options.kv_cache_dtype)
    longest = options.loads()[-1]
    for model in (donor, converted):
        model.require_length(longest.context)
    free = available_memory(device)
    fixed, per_row = memory_needed(donor.config, converted.config, longest, dtype.itemsize, options.reexpand)
    needed = fixed + longest.batch * per_row
    if free is None or needed <= free:
        return
    fitting = max(0, (free - fixed) // per_row)
    remedy = f"--batch {fitting} would fit" if fitting else "use shorter --contexts or a smaller --dtype"
    raise MhconvertError(
        f"--batch {longest.batch} at context {longest.context} needs about {size(needed)} of memory on {device} "
        f"and {size(free)} are free; {remedy}"
    )


def _time(donor: Any, converted: Any, options: Options, on_progress: Listener) -> dict[str, Any]:
    """The timings of both models under every load, with the settings that they depend on."""
    loads, rows, place = options.loads(), [], donor.device
    total, done = len(loads) * options.new_tokens, 0

    def count_step() -> None:
        nonlocal done
        done += 1
        on_progress(Progress("speed", done, total, f"context {load.context:,}"))

    for load in loads:
        on_progress(Progress("speed", done, total, f"context {load.context:,}, prefill"))
        timed = partial(speed.compare, donor, converted, load, reexpand=options.reexpand)
        row = timed(kv_cache_dtype=options.kv_cache_dtype, on_step=count_step)
        for name, model in (("donor", donor), ("converted", converted)):
            planned = load.batch * step_bytes(model.config, load, donor.dtype.itemsize)
            row[name]["step_memory_planned_bytes"] = planned
        rows.append(row)
    return {
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "step_tokens": options.step_tokens,
        "chunk_tokens": options.chunk_tokens,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "threads": torch.get_num_threads(),
        "dtype": str(donor.dtype).removeprefix("torch."),
        "cache": "static" if loads[0].static_cache else "dynamic",
        "kv_cache_dtype": options.kv_cache_dtype,
        "compiled": options.compile,
        "rows": rows,
    }


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    return DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
