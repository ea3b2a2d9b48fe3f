"""Divides a run's settings into steps and rows, and makes the accelerator that takes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from mhconvert.device import half_products
from mhconvert.errors import HealError

from ..convert.recipe.heal_settings import HealSettings

ROW = 1024  # tokens, where both models read as many
STEPS = 200  # that a batch is sized for, within these tokens
LEAST_BATCH, MOST_BATCH = 1024, 65536
MICRO_ROWS = {"cpu": 2, "cuda": 8}
TENTHS = 10  # measurements and durable checkpoints of a run, unless settings say otherwise
FITTING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


@dataclass(frozen=True)
class Steps:
    """steps of batch_rows rows of `length` tokens, `micro_rows` at a time in each process; from step `lm_from` on the
    text alone teaches. eval_every, save_every: in steps."""

    steps: int
    length: int
    batch_rows: int
    micro_rows: int
    lm_from: int
    eval_every: int
    save_every: int

    @property
    def step_tokens(self) -> int:
        return self.batch_rows * self.length

    @property
    def rows(self) -> int:
        """Rows that the whole run reads, repeated ones counted again."""
        return self.steps * self.batch_rows


def divide(settings: HealSettings, limit: int | None, processes: int, device: str) -> Steps:
    """limit: tokens that both models read at most. Raises HealError for sizes that do not go together."""
    length = settings.sequence_length or min(ROW, limit or ROW)
    if limit and length > limit:
        raise HealError(
            f"sequence_length={length} is more than the models read; choose --sequence-length ≤ {limit}"
        )
    wished = settings.batch_tokens or min(MOST_BATCH, max(LEAST_BATCH, settings.tokens // STEPS))
    of_each = max(1, round(wished / length / processes))
    most = min(of_each, MICRO_ROWS.get(device, MICRO_ROWS["cuda"]))
    micro = settings.micro_batch or next(n for n in range(most, 0, -1) if of_each % n == 0)
    if of_each % micro:
        raise HealError(
            f"micro_batch={micro} does not divide the {of_each} rows of a batch of {wished} tokens in {processes} "
            f"process{'es' * (processes > 1)}; choose a divisor, or another --batch-tokens"
        )
    rows = of_each * processes
    steps = -(-settings.tokens // (rows * length))
    of_text = -(-settings.lm_tokens // (rows * length))

    def every(tokens: int | None) -> int:
        return max(1, -(-steps // TENTHS) if tokens is None else round(tokens / (rows * length)))

    return Steps(
        steps, length, rows, micro, steps - of_text, every(settings.eval_tokens), every(settings.save_tokens)
    )


def make_accelerator(settings: HealSettings) -> Accelerator:
    """Return this process's accelerator, alone or under `accelerate launch`. Raises HealError for an unfit config."""
    if settings.device not in (None, "cpu", "cuda"):
        raise HealError(
            f"device '{settings.device}' is neither cpu nor cuda; CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise HealError("device 'cuda' cannot be used: torch finds no GPU; leave it out, or use cpu")
    waiting = InitProcessGroupKwargs(
        timeout=timedelta(days=7)
    )  # the first process samples, measures and writes alone
    options: dict[str, Any] = {"cpu": settings.device == "cpu", "kwargs_handlers": [waiting]}
    if is_initialized():  # in a notebook, by somebody else: this process stays as it is
        options = {}
    elif "ACCELERATE_MIXED_PRECISION" not in os.environ:
        device = torch.device("cpu" if settings.device == "cpu" or not torch.cuda.is_available() else "cuda")
        options["mixed_precision"] = "bf16" if isinstance(half_products(device), torch.autocast) else "no"
    try:
        accelerator = Accelerator(**options)
    except (ValueError, ImportError, RuntimeError) as error:
        raise HealError(
            f"accelerate does not start with its config: {' '.join(str(error).split())}"
        ) from error
    _require_fitting(accelerator)
    return accelerator


def _require_fitting(accelerator: Accelerator) -> None:
    kind, started = accelerator.distributed_type, int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise HealError(
            f"{started} processes were started and accelerate joins {accelerator.num_processes}; the config asks for "
            "GPUs that are not there: use one process, or torchrun with ACCELERATE_USE_CPU=true"
        )
    if kind not in FITTING:
        raise HealError(
            f"the accelerate config asks for {kind.value}, which healing does not run on; use one process, DDP "
            "(MULTI_GPU, MULTI_CPU) or FSDP 2: recipes/ has configs for both"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind is DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) != 2:
        raise HealError(
            "the accelerate config asks for FSDP 1; set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise HealError(
            f"the accelerate config accumulates {accelerator.gradient_accumulation_steps} steps; leave that out: "
            "--batch-tokens and --micro-batch decide it"
        )
