"""What every whole-model export holds beside its weights and configuration: carried files, card and provenance."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import ExportError
from mhconvert.library_versions import versions

from ..checkpoint import provenance
from ..checkpoint.card_front_matter import front_matter
from ..donor import hub_download
from ..storage.atomic_files import write_json
from ..storage.dtype_cast import torch_dtype
from ..storage.safetensors_reader import SafetensorsSource


def written_dtype(wanted: str | None, source: SafetensorsSource) -> torch.dtype:
    """The dtype of an export's weights: the one named `wanted`, or for None that of the stored embeddings.

    Raises:
        ExportError: for a name that is no dtype of weights.
    """
    if wanted is None:
        return source.dtype("model.embed_tokens.weight")
    return torch_dtype(wanted, ExportError)


def bytes_in(source: SafetensorsSource, dtype: torch.dtype) -> int:
    """The bytes of all tensors of `source` if each were stored in `dtype`."""
    return dtype.itemsize * sum(source.nbytes(name) // source.dtype(name).itemsize for name in source.names())


def carry_files(source: Path, target: Path, *more: str) -> None:
    """Copy tokenizer, chat template, generation settings and licence of `source`, byte for byte.

    Args:
        source: the folder to copy from.
        target: the folder to copy into.
        more: patterns of further files to copy.
    """
    patterns = (*hub_download.CARRIED_FILES, *more)
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    for file in files:
        shutil.copyfile(file, target / file.name)


def write_card(
    folder: Path, name: str, text: str, report: dict[str, Any], donor: dict[str, Any], served: str
) -> None:
    """Write README.md: front matter, `name` as its title, `text`, and the table of engines if the report has one.

    Args:
        report: of the export: method, and engines [(engine, whether it serves it, how or why not)].
        donor: its reference, hub_id and licence.
        served: the title of the column that says whether an engine serves it.
    """
    head = front_matter(
        library="transformers",
        base=donor.get("hub_id"),
        relation="finetune",
        licence=donor.get("licence"),
        tags=["mhconvert", report["method"], "kv-cache"],
    )
    rows = [
        f"| {engine} | {'yes' if yes else 'no'} | {how} |" for engine, yes, how in report.get("engines", [])
    ]
    table = ["", f"| engine | {served} | |", "|---|---|---|", *rows] if rows else []
    lines = [head, f"# {name}", "", text, *table]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_record(folder: Path, report: dict[str, Any], donor: dict[str, Any], **kept: Any) -> None:
    """Write mhconvert.json: the export's report, the donor of its checkpoint, versions, and hashes of the files.

    Args:
        kept: what else of the checkpoint's own mhconvert.json stays true of the export.
    """
    facts = {"exported": report, "donor": donor, "versions": versions(), "sha256": provenance.hashes(folder)}
    write_json(folder / provenance.PROVENANCE, kept | facts)
