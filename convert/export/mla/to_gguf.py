"""`mhconvert export CKPT --to gguf`: a GGUF file for llama.cpp, written from the dense DeepSeek-V3 form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError, OutputError
from mhconvert.progress import Listener, ignore

from ... import open_model
from ...storage.output_folder import require_outside
from .. import engine_support
from . import gguf_tokenizer, gguf_writer, padded_row, to_deepseek_v3

F16_BYTES = 2  # of an element of llama.cpp's cache by default


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    kind: str = "bf16",
    pad_row: int | None = None,
    engine: engine_support.Named | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the portable MLA checkpoint `reference` as one GGUF file.

    Args:
        output: the file; None: ./<checkpoint>-<kind>.gguf.
        kind: of its matrices.
        verify: whether the dense form that it is written from is reloaded and compared.
        pad_row, engine, force, dry_run, device, trust_remote_code: as in `forms.Options`.
    Returns:
        The report of the dense form, with output and kind of the file, and bytes, tensors and skipped once written.
    """
    tell = on_progress or ignore
    folder = open_model.checkpoint_folder(reference) or Path(reference)
    place = Path(output) if output else Path(f"{folder.resolve().name}-{kind}.gguf")
    _require_place(place, folder, force, engine)
    opened = open_model.open_model(reference, device=device, trust_remote_code=trust_remote_code)
    # refused before the work:
    gguf_tokenizer.read_vocabulary(opened.folder, opened.vocab_size, trust_remote_code)
    with tempfile.TemporaryDirectory(dir=place.absolute().parent, prefix=f".{place.name}-") as work:
        dense = Path(work) / "dense"
        report = to_deepseek_v3.export_checkpoint(
            reference,
            "deepseek_v3",
            str(dense),
            dtype="float32",
            pad_values=False,
            pad_row=pad_row,
            verify=verify,
            dry_run=dry_run,
            device=device,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
        if dry_run:
            return _facts(report, opened.config) | {"kind": kind, "output": str(place)}
        made = gguf_writer.write(dense, place, kind, force=force, trusted=trust_remote_code, on_progress=tell)
    return _facts(report, opened.config) | made | {"output_bytes": made["bytes"], "output": str(place)}


def _facts(report: dict[str, Any], config: Any) -> dict[str, Any]:
    """The facts of the file, from the `report` of the dense form of a checkpoint with `config`."""
    of_dense = ("output_bytes", "engines", "dtype", "verified")
    return {name: value for name, value in report.items() if name not in of_dense} | {
        "architecture": "deepseek2",
        "kv_bytes_per_token": report["kv_elements_per_token"] * F16_BYTES,
        "padded_row": padded_row.cost(config, report["kv_lora_rank"], F16_BYTES),
        "dense_form_verified": report.get("verified"),
    }


def _require_place(place: Path, folder: Path, force: bool, engine: str | None) -> None:
    """Raises OutputError unless `place` names a .gguf file that may be written, outside of the checkpoint `folder`.

    Raises ExportError for an `engine` that reads no such file.
    """
    if engine not in (None, "llama.cpp"):
        raise ExportError(f"a gguf of deepseek2 is for llama.cpp, and {engine} takes other forms: --to auto")
    if place.suffix != ".gguf":
        raise OutputError(f"{place} does not end in .gguf; a gguf export is one file of that ending")
    if place.is_dir():
        raise OutputError(f"{place} is a folder; a gguf export is one file")
    if place.exists() and not force:
        raise OutputError(f"{place} exists; choose another file with -o, or replace it with --force")
    if not place.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {place.absolute().parent} to write {place.name} into")
    require_outside(place, folder)
