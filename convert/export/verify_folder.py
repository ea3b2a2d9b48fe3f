"""`mhconvert verify`: loads a folder in a bare process and compares its logits with what they should be."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import CheckpointError, ExportError, ProofError, UnsupportedError
from mhconvert.progress import Listener, Progress, ignore

from .. import open_model
from ..bare_process.reload import verify, write_probe
from ..checkpoint import identity
from ..checkpoint.provenance import read_record
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import read_json
from . import same_outputs

FREE = 1e9  # a tolerance that refuses nothing: differences are judged in this module


def verify_folder(
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
    if not folder.is_dir():
        raise CheckpointError(f"{reference} is no folder; verify takes a folder with a whole model in it")
    if is_adapter(folder):
        raise CheckpointError(
            f"{reference} is an adapter and no whole model; mhconvert merge makes one of it"
        )
    if not trust_remote_code:
        _require_known_code(folder)
    twin = against or _twin(reference, folder)
    tell(Progress("donor", 0, 1, twin))
    opened = open_model.open_model(twin, trust_remote_code=trust_remote_code)
    _require_one_vocabulary(folder, opened.vocab_size, twin)
    model = opened.model()
    expected = same_outputs.expect(model, opened.tokenizer(), seed, tell)
    del model
    tell(Progress("verify", 0, 1))
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as work:
        probe = Path(work) / "probe.safetensors"
        write_probe(probe, expected.rows, expected.logits)
        found = verify(
            folder,
            probe,
            prompt=same_outputs.PROMPT,
            max_new_tokens=same_outputs.NEW_TOKENS,
            tolerance=FREE,
            threads=torch.get_num_threads(),
            python=python,
        )
    found["greedy_equal"] = found["sample"]["text"] == expected.text
    found["relative_difference"] = found["largest_logit_difference"] / found["logit_spread"]
    limit = tolerance if tolerance is not None else _tolerance(folder) if against is None else None
    if limit is not None and not found["relative_difference"] <= limit:
        raise ProofError(
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


def _require_known_code(folder: Path) -> None:
    """Raises UnsupportedError for Python files in the folder that this package does not ship, byte for byte."""
    package = Path(__file__).parent.parent
    for name in ("config.json", "tokenizer_config.json"):
        named = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if "--" in json.dumps(named):  # transformers' form for code of another repository
            raise UnsupportedError(
                f"{folder / name} names code of another repository, and verify would run it; "
                "--trust-remote-code allows it"
            )
    for file in sorted(folder.rglob("*.py")):
        if not any(own.read_bytes() == file.read_bytes() for own in package.rglob(file.name)):
            raise UnsupportedError(
                f"{file} is code that this version of mhconvert does not ship, and verify would run it; "
                "--trust-remote-code allows it"
            )


def _require_one_vocabulary(folder: Path, vocab_size: int, twin: str) -> None:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    own = config.get("vocab_size", vocab_size)
    if own != vocab_size:
        raise CheckpointError(
            f"{folder} has {own} tokens and {twin} has {vocab_size}; they cannot be compared"
        )


def _twin(reference: str, folder: Path) -> str:
    """The model that the folder should equal: of an export its checkpoint; else the folder, in this package's class."""
    exported = read_record(folder).get("exported") or {}
    source = exported.get("source") or exported.get("checkpoint")
    if source is not None and Path(source).is_dir():
        return str(source)
    if source is not None:
        raise ExportError(
            f"{reference} was exported from {source}, which is not there; name it with --against"
        )
    if identity.converted_method(reference) is not None:
        return reference
    raise ExportError(f"{reference} does not say what it should compute; name a model with --against")


def _tolerance(folder: Path) -> float:
    """The default tolerance: larger for exports whose weights were multiplied and rounded."""
    exported = read_record(folder).get("exported") or {}
    rounded = exported.get("to") in ("deepseek_v3", "youtu") and exported.get("dtype") != "float32"
    return same_outputs.ROUNDED if rounded or exported.get("exact") is False else same_outputs.TOLERANCE
