"""`mhconvert verify`: loads a folder in a bare process and compares its logits with what they should be."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import CheckpointError, ExportError, ProofError
from mhconvert.progress import Listener, Progress, ignore

from .. import open_model
from ..bare_process.known_code import require_known_code
from ..bare_process.reload import verify, write_probe
from ..checkpoint import identity
from ..checkpoint.provenance import read_record, require_recorded_files
from ..donor.tokenizer_files import require_tokenizer
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import SafetensorsSource, read_json
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
    """Compare what `reference` computes in a bare process with the model that it should be, or with `against`.

    Args:
        reference: a folder with a whole model in it.
        against: a model; None: the one that the folder says it should equal.
        tolerance: of the largest logit difference, in standard deviations of the logits; None: by the export's dtype,
            and with `against` nothing is refused.
        python: the interpreter of another environment; None: this one.
        trust_remote_code: whether code that this package does not ship may run.
        seed: of the text for the comparison.

    Returns:
        folder, against, tolerance, seconds, and what `_measure` returns.

    Raises:
        CheckpointError: for what is no folder with a whole model, or does not load.
        ExportError: where nothing says what the folder should compute.
        ProofError: where the logits differ by more.
        UnsupportedError: for code that is not trusted.
    """
    begun, tell = time.perf_counter(), on_progress or ignore
    folder = _model_folder(reference)
    if not trust_remote_code:
        require_known_code(folder)
    twin = against or _twin(reference, folder)
    tell(Progress("donor", 0, 1, twin))
    opened = open_model.open_model(twin, trust_remote_code=trust_remote_code)
    _require_one_vocabulary(folder, opened.vocab_size, twin)
    expected = same_outputs.expect(opened.model(), opened.tokenizer(), seed, tell)
    tell(Progress("verify", 0, 1))
    measured = _measure(folder, expected, python, trust_remote_code)
    limit = tolerance if tolerance is not None else _tolerance(folder) if against is None else None
    if limit is not None and not measured["relative_difference"] <= limit:
        raise ProofError(
            f"{reference} is not {twin}: their logits differ by {measured['relative_difference']:.3g} standard "
            f"deviations, and {limit:g} is allowed"
        )
    tell(Progress("done", 1, 1))
    seconds = time.perf_counter() - begun
    return {"folder": reference, "against": twin, "tolerance": limit, **measured, "seconds": seconds}


def _model_folder(reference: str) -> Path:
    """The folder `reference`. Raises CheckpointError where it is none, or holds an adapter."""
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{reference} is no folder; verify takes a folder with a whole model in it")
    if is_adapter(folder):
        raise CheckpointError(
            f"{reference} is an adapter and no whole model; mhconvert merge makes one of it"
        )
    SafetensorsSource(folder)  # whose errors name the file
    require_recorded_files(folder)
    require_tokenizer(folder)
    return folder


def _measure(
    folder: Path, expected: same_outputs.Expected, python: str | None, trusted: bool
) -> dict[str, Any]:
    """What `folder` computes in a bare process of the interpreter `python`, beside what is expected.

    Returns:
        What `bare_process.reload.verify` returns, with greedy_equal and relative_difference.

    Raises:
        ProofError: for a cache of another size than an export says.
    """
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as work:
        probe = Path(work) / "probe.safetensors"
        write_probe(probe, expected.rows, expected.logits)
        reloaded = verify(
            folder,
            probe,
            prompt=same_outputs.PROMPT,
            max_new_tokens=same_outputs.NEW_TOKENS,
            tolerance=FREE,
            threads=torch.get_num_threads(),
            python=python,
            trusted=trusted,
        )
    if python is None:  # another transformers may cache more
        same_outputs.require_cache(folder, reloaded["cache"], _elements_per_token(folder), str(folder))
    return reloaded | {
        "greedy_equal": reloaded["sample"]["text"] == expected.text,
        "relative_difference": reloaded["largest_logit_difference"] / reloaded["logit_spread"],
    }


def _require_one_vocabulary(folder: Path, vocab_size: int, twin: str) -> None:
    """Raises CheckpointError where `folder` has another number of tokens than `twin`, which has `vocab_size`."""
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


def _elements_per_token(folder: Path) -> float | None:
    """What an export says that its cache holds, all layers together; None where nothing says it."""
    return (read_record(folder).get("exported") or {}).get("kv_elements_per_token")


def _tolerance(folder: Path) -> float:
    """The default tolerance: larger for exports whose weights were multiplied and rounded."""
    exported = read_record(folder).get("exported") or {}
    rounded = exported.get("to") in ("deepseek_v3", "youtu") or exported.get("exact") is False
    narrow = exported.get("dtype") != "float32"  # float32 holds every weight, whatever it was
    return same_outputs.ROUNDED if rounded and narrow else same_outputs.TOLERANCE
