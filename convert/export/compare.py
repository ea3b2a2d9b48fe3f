"""`mhconvert verify`: a folder in a bare process beside the model that it should be, or the one that it came from."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mhconvert.convert import load
from mhconvert.convert.checkpoint import is_adapter
from mhconvert.convert.errors import CheckpointError, ExportError
from mhconvert.convert.export import proof
from mhconvert.convert.progress import Listener, Progress, ignore
from mhconvert.convert.provenance import PROVENANCE, write_probe
from mhconvert.convert.verify import verify

FREE = 1e9  # a tolerance that refuses nothing: what is reported is judged here


def run(
    reference: str,
    *,
    against: str | None = None,
    tolerance: float | None = None,
    python: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """See `mhconvert.api.verify`."""
    begun, tell = time.perf_counter(), on_progress or ignore
    folder = Path(reference).expanduser()
    if not folder.is_dir() or is_adapter(folder):
        raise CheckpointError(f"{reference} is no folder of a whole model; merge an adapter first")
    twin = against or _twin(reference, folder)
    tell(Progress("donor", 0, 1, twin))
    opened = load.open_model(twin, trust_remote_code=trust_remote_code)
    model = opened.model()
    expected = proof.expect(model, opened.tokenizer(), seed, tell)
    del model
    tell(Progress("verify", 0, 1))
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as work:
        probe = Path(work) / "probe.safetensors"
        write_probe(probe, expected.rows, expected.logits)
        found = verify(
            folder,
            probe,
            prompt=proof.PROMPT,
            max_new_tokens=proof.NEW_TOKENS,
            tolerance=FREE,
            threads=torch.get_num_threads(),
            python=python,
        )
    found["greedy_equal"] = found["sample"]["text"] == expected.text
    found["relative_difference"] = found["largest_logit_difference"] / found["logit_spread"]
    limit = tolerance if tolerance is not None else _tolerance(folder) if against is None else None
    if limit is not None and not found["relative_difference"] <= limit:
        raise ExportError(
            f"{reference} is not {twin}: their logits differ by {found['relative_difference']:.3g} standard "
            f"deviations, and {limit:g} is allowed"
        )
    tell(Progress("done", 1, 1))
    return {
        "folder": reference,
        "against": twin,
        "tolerance": limit,
        **found,
        "seconds": time.perf_counter() - begun,
    }


def _twin(reference: str, folder: Path) -> str:
    """What the folder should compute: an export its checkpoint, a converted checkpoint itself by our own class."""
    exported = _record(folder).get("exported") or {}
    source = exported.get("checkpoint")
    if source is not None and Path(source).is_dir():
        return str(source)
    if source is not None:
        raise ExportError(
            f"{reference} was exported from {source}, which is not there; name it with --against"
        )
    if load.converted_method(reference) is not None:
        return reference
    raise ExportError(f"{reference} does not say what it should compute; name a model with --against")


def _tolerance(folder: Path) -> float:
    """By the dtype of its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    exported = bool(_record(folder).get("exported"))
    return proof.TOLERANCES.get(stored, 0.5) if exported else proof.TOLERANCES[torch.float32]


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
