"""The free memory of a device, what a benchmark needs of it, and what a piece of work takes."""

from __future__ import annotations

import ctypes
import sys
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
# glibc's mallopt: blocks from this size on are mapped, and unmapped when they are free. The larger one is what its own
# adjustment ends with.
MMAP_THRESHOLD, SMALL_BLOCK, LARGE_BLOCK = -3, 1 << 16, 32 << 20
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
    decoding = sum(map(sum, caches)) + reexpand * (sum(caches[1]) + expanded)
    step = max(step_bytes(config, load, width) for config in (donor, converted))
    weights = parameters(donor) + parameters(converted)
    return width * (weights + load.context * prefill), width * load.context * decoding + step


def step_bytes(config: Any, load: Load, width: int) -> int:
    """Bytes that a decode step of one row has for a while: the copy of the layer's cache that grows, and twice its
    scores, in float32.

    Args:
        width: bytes per element of the cache.
    """
    scores = 8 * config.get_text_config().num_attention_heads * load.step_tokens
    return round(load.context * (width * max(cache_elements(config)) + scores))


def peak_bytes(work: Callable[[], None], device: torch.device) -> int | None:
    """Calls `work` twice: the bytes that the second time allocates at most beside those from before it; None if the
    machine does not tell.

    On the CPU they are pages of this process, under Linux with glibc. For both calls blocks are mapped one by one, and
    gone when they are free: otherwise what the allocator keeps at hand would hide some, and show others twice.
    """
    if device.type == "cuda":
        work()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    library = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        work()
        work()
        return None
    library.mallopt(MMAP_THRESHOLD, SMALL_BLOCK)
    try:
        work()
        library.malloc_trim(0)
        start = _reset_peak()
        work()
        return None if start is None else max(0, (_resident("VmHWM") or 0) - start)
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def _reset_peak() -> int | None:
    """The resident bytes of this process, from which its peak starts again; None where Linux does not let us."""
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return next(found, None)
