"""The steps and batches of a healing run, and its accelerator."""

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

ROW_TOKENS = 1024  # default length of a row, if both models can read it
DEFAULT_STEPS = 200  # the default batch size aims at this many steps
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 1024, 65536  # of the default batch size
MICRO_ROWS = {"cpu": 2, "cuda": 8}
DEFAULT_CHECKPOINTS = 10  # default number of measurements and of training checkpoints in a run
SUPPORTED_TYPES = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)


@dataclass(frozen=True)
class Steps:
    """The division of a run into optimiser steps.

    Attributes:
        length: tokens per row.
        batch_rows: rows per step over all processes.
        micro_rows: rows per forward pass of a process.
        lm_from: the step from which on only the text is learnt, without the teacher.
        eval_every, save_every: in steps.
    """

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
        """Rows of the whole run, with repetitions."""
        return self.steps * self.batch_rows


def divide(settings: HealSettings, limit: int | None, processes: int, device: str) -> Steps:
    """The steps for these settings.

    Args:
        limit: the longest row that both models can read, in tokens; None for no limit.
        processes: their number.
        device: "cpu" or "cuda".

    Raises:
        HealError: the sizes in the settings do not fit together.
    """
    length = settings.sequence_length
    if length is None:
        length = min(ROW_TOKENS, limit or ROW_TOKENS)
    if limit and length > limit:
        raise HealError(
            f"sequence_length={length} is more than the models read; choose --sequence-length ≤ {limit}"
        )
    batch_tokens = settings.batch_tokens
    if batch_tokens is None:
        batch_tokens = min(MAX_BATCH_TOKENS, max(MIN_BATCH_TOKENS, settings.tokens // DEFAULT_STEPS))
    process_rows = max(1, round(batch_tokens / length / processes))
    largest = min(process_rows, MICRO_ROWS.get(device, MICRO_ROWS["cuda"]))
    micro = settings.micro_batch or next(n for n in range(largest, 0, -1) if process_rows % n == 0)
    if process_rows % micro:
        raise HealError(
            f"micro_batch={micro} does not divide the {process_rows} rows of a batch of {batch_tokens} tokens in "
            f"{processes} process{'es' * (processes > 1)}; choose a divisor, or another --batch-tokens"
        )
    rows = process_rows * processes
    steps = -(-settings.tokens // (rows * length))
    lm_steps = -(-settings.lm_tokens // (rows * length))

    def every(tokens: int | None) -> int:
        return max(1, -(-steps // DEFAULT_CHECKPOINTS) if tokens is None else round(tokens / (rows * length)))

    return Steps(
        steps, length, rows, micro, steps - lm_steps, every(settings.eval_tokens), every(settings.save_tokens)
    )


def make_accelerator(settings: HealSettings) -> Accelerator:
    """The accelerator of this process, alone or under `accelerate launch`.

    Raises:
        HealError: the device cannot be used, or the accelerate config is not supported.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise HealError("device 'cuda' cannot be used: torch finds no GPU; leave it out, or use cpu")
    # The other processes wait while the first one samples, measures and writes.
    process_group = InitProcessGroupKwargs(timeout=timedelta(days=7))
    options: dict[str, Any] = {"cpu": settings.device == "cpu", "kwargs_handlers": [process_group]}
    if is_initialized():  # for example in a notebook: accelerate cannot be configured again
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
    _require_supported(accelerator)
    return accelerator


def _require_supported(accelerator: Accelerator) -> None:
    """Raises HealError for an accelerate config on which healing does not run."""
    kind, started = accelerator.distributed_type, int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise HealError(
            f"{started} processes were started and accelerate joins {accelerator.num_processes}; the config asks for "
            "GPUs that are not there: use one process, or torchrun with ACCELERATE_USE_CPU=true"
        )
    if kind not in SUPPORTED_TYPES:
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
