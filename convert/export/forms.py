"""`mhconvert export`: which form a checkpoint takes, what `auto` means for it, and who writes each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError, UnsupportedError
from mhconvert.progress import Listener

from .. import open_model
from ..checkpoint import identity
from ..storage.folder_kind import is_adapter

FORMS = {  # what `--to` takes, and whose checkpoints have it
    "deepseek_v3": "mla",
    "youtu": "mla",
    "own": "mla",
    "gguf": "mla",
    "llama": "dha",
    "nemotron-nas": "dha",
    "lora": "hydra",
}
LOSSES = (ExportError, UnsupportedError)  # after which `auto` looks at the next form
MADE_FOR = {
    "mla": "what --to mla --profile portable makes",
    "dha": "what --to dha makes",
    "hydra": "an adapter of --to hydra",
}


Writer = Callable[[str, "Options", Listener | None], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """How an export is made. dtype: of an mla export's weights; None: their own. kind: of a gguf's. duplicate: of dha,
    whether heads may be cached twice. verify: whether the result is reloaded and compared. base: of an adapter."""

    output: str | None = None
    base: str | None = None
    dtype: str | None = None
    kind: str = "bf16"
    duplicate: bool = False
    verify: bool = True
    force: bool = False
    dry_run: bool = False
    device: str | None = None
    trust_remote_code: bool = False


def run(reference: str, to: str, options: Options, on_progress: Listener | None = None) -> dict[str, Any]:
    """See `mhconvert.api.export`."""
    if to not in (*FORMS, "auto"):
        raise ExportError(f"'{to}' is no form of export; choose one of {', '.join(FORMS)}, auto")
    method = _method(reference)
    if to != "auto" and FORMS[to] != method:
        raise ExportError(f"{reference} was made by {method}, and {to} holds {MADE_FOR[FORMS[to]]}")
    if to != "auto":
        return WRITERS[to](reference, options, on_progress) | {"to": to, "why": None}
    lost: list[str] = []
    for form in (form for form, of in FORMS.items() if of == method and form != "gguf"):
        try:
            made = WRITERS[form](reference, options, on_progress)
        except LOSSES as error:
            lost.append(f"{form}: {error}")
            continue
        why = "; ".join(lost) or "it is exact, and what most engines load"
        return made | {"to": form, "why": why}
    raise ExportError(f"no form holds {reference}: {'; '.join(lost)}")


def _stock_mla(to: str) -> Writer:
    def write(reference: str, options: Options, tell: Listener | None) -> dict[str, Any]:
        from .mla import to_deepseek_v3

        return to_deepseek_v3.run(
            reference,
            to,
            options.output,
            dtype=options.dtype,
            verify=options.verify,
            force=options.force,
            dry_run=options.dry_run,
            device=options.device,
            on_progress=tell,
        )

    return write


def _own(reference: str, options: Options, tell: Listener | None) -> dict[str, Any]:
    from .mla import to_own

    return to_own.run(
        reference,
        options.output,
        dtype=options.dtype,
        verify=options.verify,
        force=options.force,
        dry_run=options.dry_run,
        device=options.device,
        on_progress=tell,
    )


def _gguf(reference: str, options: Options, tell: Listener | None) -> dict[str, Any]:
    from .mla import to_gguf

    _no_dry_run("gguf", options)
    return to_gguf.run(
        reference,
        options.output,
        kind=options.kind,
        verify=options.verify,
        force=options.force,
        device=options.device,
        on_progress=tell,
    )


def _decoupled(to: str, module: str) -> Writer:
    def write(reference: str, options: Options, tell: Listener | None) -> dict[str, Any]:
        _no_dry_run(to, options)
        writer = importlib.import_module(f"mhconvert.convert.export.{module}")
        made: dict[str, Any] = writer.run(
            reference,
            options.output,
            force=options.force,
            duplicate=options.duplicate,
            verify=options.verify,
            on_progress=tell,
        )
        return made

    return write


def _lora(reference: str, options: Options, tell: Listener | None) -> dict[str, Any]:
    from . import to_lora

    _no_dry_run("lora", options)
    return to_lora.run(
        reference,
        options.output,
        base=options.base,
        force=options.force,
        trust_remote_code=options.trust_remote_code,
        on_progress=tell,
    )


def _no_dry_run(to: str, options: Options) -> None:
    if options.dry_run:
        raise ExportError(
            f"--dry-run tells which engines load deepseek_v3, youtu and own; {to} has no such table"
        )


WRITERS: dict[str, Writer] = {
    "deepseek_v3": _stock_mla("deepseek_v3"),
    "youtu": _stock_mla("youtu"),
    "own": _own,
    "gguf": _gguf,
    "llama": _decoupled("llama", "dha.to_llama"),
    "nemotron-nas": _decoupled("nemotron-nas", "dha.to_nemotron_nas"),
    "lora": _lora,
}


def _method(reference: str) -> str:
    """The method that made the checkpoint. Raises ExportError for what has nothing to export."""
    path = Path(reference).expanduser()
    if is_adapter(path):
        return "hydra"
    if identity.exported(reference):
        raise ExportError(f"{reference} is an export already; export the checkpoint that it was made from")
    folder = open_model.checkpoint_folder(reference)
    method = identity.made_by(str(folder or path))
    if method is None:
        raise ExportError(
            f"{reference} is no checkpoint that mhconvert converted; an export begins with one: "
            f"mhconvert {reference} --to mla --profile portable"
        )
    if method == "dha" and folder is None:
        raise ExportError(f"{reference} is of its donor's own class already: engines load it as it is")
    if method == "moh":
        raise ExportError(
            f"{reference} routes its heads, which no stock class does: it is served by its own class alone, with "
            "trust_remote_code, as the folder is"
        )
    return method
