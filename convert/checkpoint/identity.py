"""The kind of a model folder: a converted checkpoint and its method, or an export."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mhconvert.errors import CheckpointError

from ..methods.registry import METHODS
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import read_json
from .provenance import read_record


def converted_method(reference: str) -> str | None:
    """The method whose model class the folder `reference` has; None for other classes."""
    try:
        method = str(read_json(Path(reference) / "config.json").get("model_type", "")).split("_")[0]
    except CheckpointError:
        return None
    return method if method in METHODS else None


def made_by(reference: str) -> str | None:
    """The method that made the folder `reference`, by its model class or, for transformers' classes, by its record.

    None for a folder that no method made.
    """
    method = converted_method(reference)
    if method is None and not is_adapter(Path(reference)):
        record = read_record(Path(reference))
        with suppress(KeyError, TypeError):
            method = record["exported" if "exported" in record else "recipe"]["method"]
    return method if method in METHODS else None


def exported(reference: str) -> bool:
    """Whether `mhconvert export` wrote the folder `reference`, as a model and not as an adapter."""
    folder = Path(reference).expanduser()
    return "exported" in read_record(folder) and not is_adapter(folder)
