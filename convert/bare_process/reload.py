"""Reloads a finished checkpoint in a bare process, compares its logits with the pass's, and measures its cache."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mhconvert.errors import CheckpointError, ReloadKilledError

from . import child as bare_child
from .known_code import require_known_code

logger = logging.getLogger(__name__)

# Of the logits' standard deviation. Two float32 evaluations of one model (other kernels, other order of sums)
# differ by about 1e-6 x depth; a wrong tensor, frequency or mask differs by more than 0.1.
TOLERANCE = 5e-3
PROMPT = "The history of science shows that"


def write_probe(path: Path, input_ids: Tensor, logits: Tensor) -> None:
    """Rows and the logits that the converted model gives for them: what a reload is compared with."""
    save_file({"input_ids": input_ids.contiguous(), "logits": logits.contiguous()}, path)


def verify(
    folder: Path,
    probe: Path,
    *,
    prompt: str,
    max_new_tokens: int = 24,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
    python: str | None = None,
    trusted: bool = False,
    context: int | None = None,
) -> dict[str, Any]:
    """What `folder` computes with plain transformers: it loads, reproduces the logits of `probe`, and generates.

    Args:
        folder: the checkpoint.
        probe: safetensors with input_ids (rows, length) int64 and logits (rows, length, vocab_size) float32.
        prompt: what is continued greedily by `max_new_tokens`.
        tolerance: the largest logit difference that is allowed, in standard deviations of the probe's logits.
        threads: of torch in the process; None: its default.
        python: the interpreter of another environment, with torch and some transformers; None: this one.
        trusted: whether code in the folder that this package does not ship may run.
        context: tokens with which the measured cache is filled; None: it is the one that `generate` leaves.

    Returns:
        largest_logit_difference, relative_logit_error, logit_spread; sample {prompt, text}; cache {type, tokens, bytes,
            bytes_per_token, elements_per_token} of the float32 cache object; parameters; seconds; peak_rss_bytes (the
            child's peak, and what this process held meanwhile).

    Raises:
        CheckpointError: The folder does not load, or its logits differ by more.
        ReloadKilledError: The process was killed.
        UnsupportedError: There is code that is not trusted.
    """
    if not trusted:
        require_known_code(folder)
    resident = _resident()
    options = {"prompt": prompt, "max_new_tokens": max_new_tokens, "threads": threads, "context": context}
    result = _run_child(folder, probe, options, python or sys.executable)
    result["peak_rss_bytes"] += resident
    if not result.pop("finite"):
        raise CheckpointError(f"{folder}: the reloaded model gives logits that are not finite")
    allowed = tolerance * result["logit_spread"]
    if not result["largest_logit_difference"] <= allowed:
        raise CheckpointError(
            f"{folder}: the reloaded model's logits differ from the converted model's by "
            f"{result['largest_logit_difference']:.3g}, and {allowed:.3g} is allowed"
        )
    return result


def _run_child(folder: Path, probe: Path, options: dict[str, Any], python: str) -> dict[str, Any]:
    """What `child` prints of `folder` in a process of the interpreter `python`, which sees no other modules of ours.

    Raises:
        CheckpointError: the process failed.
        ReloadKilledError: it was killed.
    """
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as modules:
        command = [python, "-I", bare_child.__file__, str(folder), str(probe), json.dumps(options), modules]
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", check=False
        )
    if child.returncode < 0:
        raise ReloadKilledError(
            f"the process that reloads {folder} was ended by signal {-child.returncode} (out of memory?); the same "
            "command with --resume --no-verify keeps what is finished and skips this check"
        )
    if child.returncode != 0:
        logger.debug("the bare process said:\n%s", child.stderr)
        raise CheckpointError(
            f"{folder} does not load and generate with plain transformers: {_reason(child)}"
        )
    printed: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return printed


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    """The last line of the process's error output that is not empty."""
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with status {child.returncode}"


def _resident() -> int:
    """Bytes of this process in memory now; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss(report: dict[str, Any]) -> int:
    """The largest resident size so far in bytes, of this process or of the one whose reload `report` has."""
    return max(bare_child.peak_memory(), report.get("verified", {}).get("peak_rss_bytes", 0))
