"""Which of the models in `evaluation.json` is the one in its folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError

from ...convert.checkpoint.provenance import EVALUATION
from ...convert.storage.folder_kind import ADAPTER_CONFIG, is_adapter
from ...convert.storage.safetensors_reader import read_json


@dataclass(frozen=True)
class Pair:
    """The positions of this model and of its donor in each list of `evaluation.json`; `donor` may be None."""

    this: int
    donor: int | None

    def select(self, results: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The results of the donor, {} if there is none, and of this model."""
        return (results[self.donor] if self.donor is not None else {}), results[self.this]


def pair_for(models: list[dict[str, Any]], folder: Path) -> Pair:
    """Where the model in `folder` and its donor are in `models`.

    The model is found by the fingerprint of the folder's files, for an adapter combined with its base model's.
    Without fingerprints, and for an adapter whose base model's fingerprint is unknown, it is the model whose
    reference resolves to the folder, else the last one.

    Raises CheckpointError where `models` are other files than the folder holds.
    """
    this = _position(models, folder)
    donor = next((n for n, model in enumerate(models) if model.get("role") == "donor"), None)
    return Pair(this, donor if donor != this else None)


def _position(models: list[dict[str, Any]], folder: Path) -> int:
    fingerprints = [model.get("fingerprint") for model in models]
    own_fingerprint = _fingerprint(models, folder) if any(fingerprints) else None
    if own_fingerprint is not None:
        if own_fingerprint not in fingerprints:  # a healed copy, or the folder has changed since
            raise CheckpointError(
                f"{folder / EVALUATION} measures other files than {folder} holds; run mhconvert eval, or remove it"
            )
        return len(fingerprints) - 1 - fingerprints[::-1].index(own_fingerprint)
    own = [n for n, model in enumerate(models) if _is_folder(model.get("reference"), folder)]
    return own[-1] if own else len(models) - 1


def _fingerprint(models: list[dict[str, Any]], folder: Path) -> str | None:
    """The fingerprint of the model in `folder`, as `fingerprint.of_model` computes it; None if it is unknown."""
    from ...convert.checkpoint import fingerprint

    if not is_adapter(folder):
        return fingerprint.of_folder(folder)
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    path = Path(base).expanduser()
    if base and path.exists():
        base_fingerprint = fingerprint.of_place(path)
    else:
        # A base model on the Hub is not downloaded. If it was evaluated too, the file has its fingerprint.
        stated = (m.get("fingerprint") for m in models if str(m.get("reference")).partition("@")[0] == base)
        base_fingerprint = next((str(value) for value in stated if value), "")
    own = fingerprint.of_folder(folder)
    return hashlib.sha256(f"{own} on {base_fingerprint}".encode()).hexdigest() if base_fingerprint else None


def _is_folder(reference: Any, folder: Path) -> bool:
    return bool(reference) and Path(str(reference)).expanduser().resolve() == folder.resolve()
