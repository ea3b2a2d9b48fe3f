"""The free memory of a device, and what a piece of work takes of it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ...convert.bare_process.child import peak_memory

MEMINFO = Path("/proc/meminfo")
CLEAR_PEAK = Path("/proc/self/clear_refs")
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


def peak_bytes(work: Callable[[], None], device: torch.device, compiled: bool = False) -> int | None:
    """Calls `work` three times: the bytes that the second or third time, the smaller, allocates at most beside those
    from before it; None if the machine does not tell.

    On the CPU they are pages of this process, under Linux with glibc. What other threads map meanwhile would count too,
    hence two measurements. For all calls new blocks are mapped one by one, and gone when they are free; free parts of
    older ones are given back before each module. Otherwise what the allocator keeps at hand would hide some, and show
    others twice.

    Args:
        compiled: `work` is, and would be compiled anew for a hook on its modules: it goes without.
    """
    if device.type == "cuda":
        work()
        return min(_added_cuda_bytes(work, device) for _ in range(2))
    library = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt") or not _reset_peak():
        for _ in range(3):
            work()
        return None
    library.mallopt(MMAP_THRESHOLD, SMALL_BLOCK)
    hooks = [] if compiled else [register_module_forward_pre_hook(lambda *_: _trim(library))]
    try:
        work()
        return min(_added_bytes(work, library) for _ in range(2))
    finally:
        library.mallopt(MMAP_THRESHOLD, LARGE_BLOCK)
        for hook in hooks:
            hook.remove()


def _added_cuda_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The bytes that a call of `work` allocates at most on a GPU beside those from before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _added_bytes(work: Callable[[], None], library: ctypes.CDLL) -> int:
    """The bytes by which the peak of a call of `work` exceeds the resident bytes from before it."""
    _trim(library)
    _reset_peak()
    start = peak_memory()
    work()
    return peak_memory() - start


def _trim(library: ctypes.CDLL) -> None:
    """Give free memory back to the machine."""
    library.malloc_trim(0)


def _reset_peak() -> bool:
    """Whether Linux let this process's peak start again from its resident bytes."""
    try:
        CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
