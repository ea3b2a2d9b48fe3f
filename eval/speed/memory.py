"""The free memory of a device, what a benchmark needs of it, and what a piece of work takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..inspection import cache_elements, head_dim
from .random_models import parameters

if TYPE_CHECKING:
    from .speed import Load

MEMINFO = Path("/proc/meminfo")
PROCESS = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """The bytes that can still be allocated on `device`; None if that is unknown.

    On the CPU it is Linux's MemAvailable, limited by the memory limit of the control group.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (
            (CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current")
        )
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # there is no control group, or its limit is "max"
        return free


def memory_needed(donor: Any, converted: Any, load: Load, width: int, reexpand: bool) -> tuple[int, int]:
    """(fixed, per_row): an estimate of the bytes needed to time two models, without and per row of the batch.

    It counts the weights, the activations of one row's prefill, all caches, and the copy of a layer's cache that is
    made when it grows.

    Args:
        donor, converted: configs.
        width: bytes per element.
        reexpand: whether the converted model is also timed without absorption.
    """
    text = converted.get_text_config()
    caches = [cache_elements(config) for config in (donor, converted)]
    expanded = (
        6 * text.num_attention_heads * head_dim(text)
    )  # keys and values, and the parts they are made of
    prefill = max(map(sum, caches)) + 8 * text.hidden_size + 3 * text.intermediate_size + expanded
    decoding = sum(map(sum, caches)) + max(map(step_elements, (donor, converted)))
    decoding += reexpand * (sum(caches[1]) + expanded)
    weights = parameters(donor) + parameters(converted)
    return width * (weights + load.context * prefill), width * load.context * decoding


def step_elements(config: Any) -> float:
    """Elements for each cached token that a decode step has for a while: the copy of the layer's cache that grows, and
    scores.
    """
    return max(cache_elements(config)) + 4 * config.get_text_config().num_attention_heads


def peak_bytes(work: Callable[[], None], device: torch.device) -> int | None:
    """The bytes that `work` has allocated at most beside those from before it; None if the machine does not tell.

    On the CPU they are pages of this process: work smaller than what the allocator keeps at hand shows as less.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # glibc's: what is free already goes back, so that taking it again shows
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
        before = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        work()
        return None
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
