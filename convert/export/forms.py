"""`mhconvert export`: which formats a checkpoint can take, which one `auto` means for it, and who writes each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError, UnsupportedError
from mhconvert.progress import Listener

from .. import open_model
from ..checkpoint import identity
from ..checkpoint.provenance import require_recorded_tokenizer
from ..methods import registry
from ..methods.registry import ADAPTERS, Form, MethodInfo, info
from ..storage.folder_kind import ADAPTER_CONFIG, is_adapter
from ..storage.safetensors_reader import read_json
from .engine_support import Named

CHOICES = {  # options that no other form has a use for, and their flags
    "base": "--base",
    "dtype": "--dtype",
    "kind": "--kind",
    "pad_row": "--pad-row",
    "engine": "--for",
    "duplicate": "--duplicate",
}
LOSSES = (ExportError, UnsupportedError)  # after which `auto` looks at the next form


@dataclass(frozen=True)
class Options:
    """How an export is made; a form's writer takes those that concern it.

    output: the folder or file to write; None: named after the checkpoint and the form.
    base: an adapter's base model; None: the one that it names.
    dtype: of the weights; None: their own.
    kind: of a GGUF file's matrices.
    pad_row: elements of a row of an mla cache that the latent is widened to with zeros; None: as it is.
    engine: an engine that has to take the export; None: what each takes is said, and nothing refused.
    duplicate: whether heads may be cached twice where groups do not come out equal.
    verify: whether the result is reloaded in a bare process and compared.
    force: whether an existing output is replaced.
    dry_run: refuse or report, and write nothing.
    device: a torch device; None: CUDA if present.
    trust_remote_code: whether code of the checkpoint's or the base model's folder may run, and its tokenizer's comes
        along.
    """

    output: str | None = None
    base: str | None = None
    dtype: str | None = None
    kind: str = "bf16"
    pad_row: int | None = None
    engine: Named | None = None
    duplicate: bool = False
    verify: bool = True
    force: bool = False
    dry_run: bool = False
    device: str | None = None
    trust_remote_code: bool = False


def export_checkpoint(
    reference: str, to: str, options: Options, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Write the checkpoint or adapter `reference` in the form `to`, or for "auto" in the first that holds it exactly.

    Returns:
        What the form's writer returns, with to (the form) and why (of auto: what was wrong with those before it).
    Raises:
        ExportError: for an unknown form, one of another method, or a checkpoint that none holds.
    """
    known = registry.forms()
    if to not in (*known, "auto"):
        raise ExportError(f"'{to}' is no form of export; choose one of {', '.join(known)}, auto")
    method = _method(reference)
    own = {form.name: form for form in method.forms}
    automatic = automatic_forms(method, options.engine)
    _require_used(options, [own[to]] if to in own else automatic, to)
    if to != "auto":
        if to not in own:
            source = known[to][0].exported_from
            raise ExportError(f"{reference} was made by {method.name}, and {to} holds {source}")
        return _write(reference, own[to], options, on_progress) | {"to": to, "why": None}
    lost: list[str] = []
    for form in automatic:
        try:
            made = _write(reference, form, options, on_progress)
        except LOSSES as error:
            lost.append(f"{form.name}: {error}")
            continue
        usual = f"it is exact, and what {form.engine or 'most engines'} {'reads' if form.engine else 'load'}"
        why = "; ".join(lost) or usual
        return made | {"to": form.name, "why": why}
    raise ExportError(f"no form holds {reference}: {'; '.join(lost)}")


def automatic_forms(method: MethodInfo, engine: str | None) -> list[Form]:
    """The forms that `auto` tries: those that `engine` alone reads, where there are such."""
    of_engine = [form for form in method.forms if engine is not None and form.engine == engine]
    return of_engine or [form for form in method.forms if form.automatic]


def _require_used(options: Options, forms: Sequence[Form], to: str) -> None:
    """Raises ExportError for an option that none of `forms` takes, which would be ignored."""
    given = [name for name in CHOICES if getattr(options, name) != getattr(Options, name)]
    for name in not_taken(given, forms):
        raise ExportError(f"{CHOICES[name]} does not apply to an export to {to}; leave it out")


def not_taken(names: Sequence[str], forms: Sequence[Form]) -> list[str]:
    """Those of the options `names` that no writer of `forms` takes."""
    return [name for name in names if not any(name in _arguments(form) for form in forms)]


def _arguments(form: Form) -> Mapping[str, inspect.Parameter]:
    """The parameters of the form's writer."""
    return inspect.signature(importlib.import_module(form.writer).export_checkpoint).parameters


def _write(reference: str, form: Form, options: Options, on_progress: Listener | None) -> dict[str, Any]:
    """Call the form's writer with those of `options` that are among its arguments."""
    write: Callable[..., dict[str, Any]] = importlib.import_module(form.writer).export_checkpoint
    taken = _arguments(form)
    if options.dry_run and "dry_run" not in taken:
        raise ExportError(f"--dry-run plans a folder of a whole model; {form.name} has no such plan")
    given = {"to": form.name, "on_progress": on_progress, **vars(options)}
    return write(reference, **{name: value for name, value in given.items() if name in taken})


def _method(reference: str) -> MethodInfo:
    """The method that made the checkpoint. Raises ExportError for what has nothing to export."""
    path = Path(reference).expanduser()
    open_model.require_folder(reference)
    if is_adapter(path):
        kind = str(read_json(path / ADAPTER_CONFIG).get("peft_type")).lower()
        return ADAPTERS.get(kind) or next(iter(ADAPTERS.values()))  # a writer refuses adapters of other kinds
    if identity.exported(reference):
        raise ExportError(f"{reference} is an export already; export the checkpoint that it was made from")
    folder = open_model.checkpoint_folder(reference)
    if (path / "config.json").is_file():
        read_json(path / "config.json")  # whose errors name the file
    method = identity.made_by(str(folder or path))
    if method is None:
        raise ExportError(
            f"{reference} is no checkpoint that mhconvert converted; an export begins with one: "
            f"mhconvert {reference} --to mla --profile portable"
        )
    if folder is None:
        raise ExportError(f"{reference} is of its donor's own class already: engines load it as it is")
    if not info(method).forms:
        raise ExportError(f"{reference} {info(method).no_forms}")
    require_recorded_tokenizer(folder)
    return info(method)
