"""The files of a folder as they are published on the Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from mhconvert.errors import PublishError

from ..convert.adapters.saved_adapter import WEIGHTS as ADAPTER_WEIGHTS
from ..convert.checkpoint.provenance import PROVENANCE, read_record, require_recorded_tokenizer
from ..convert.donor.reference import HUB_ID
from ..convert.storage.folder_kind import ADAPTER_CONFIG, KINDS, is_adapter
from ..convert.storage.output_folder import PARTIAL
from ..convert.storage.safetensors_reader import SafetensorsSource, read_header, read_json
from ..eval.report.model_card import CARD
from .local_paths import LocalPaths, is_text, read_text
from .published_card import published_card
from .published_files import split_files


@dataclass(frozen=True)
class Contents:
    """What a push uploads.

    Attributes:
        files: path in the repository -> a local file, or the bytes to upload if they differ from the local file.
        left_out: files of the folder that are not published.
        notes: sentences for the person who publishes it.
    """

    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """path in the repository -> bytes."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.files.items()
        }


def contents(folder: Path, repo_id: str, branch: str | None) -> Contents:
    """The files of `folder` as published under `repo_id`: with the Hub's model card and without local paths.

    Raises:
        PublishError: the folder is not a complete checkpoint or adapter.
        CheckpointError: a file is damaged.
    """
    _require_complete(folder)
    published, left_out = split_files(folder)
    files: dict[str, Path | bytes] = {path.as_posix(): folder / path for path in published}
    texts = {name: read_text(folder / name) for name in files if is_text(name) and name != CARD}
    texts[CARD] = published_card(folder, repo_id, branch)
    replacements, notes = dict[str, str](), list[str]()
    if is_adapter(folder):
        replacements, notes = _replace_base_model(folder, texts)
    paths = LocalPaths(folder, texts, replacements)
    for name, text in texts.items():
        files[name] = paths.remove_from(text).encode()
    if PROVENANCE in texts:
        files[PROVENANCE] = _provenance(folder / PROVENANCE, files)
    return Contents(dict(sorted(files.items())), [path.as_posix() for path in left_out], notes)


def _replace_base_model(folder: Path, texts: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Replace a local base model by its Hub id or its name, in place, in the adapter's config and card in `texts`.

    Returns (replacements, notes): path -> name for the other texts, and a note if the base model has no Hub id.
    """
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if not base or (HUB_ID.fullmatch(base) and not Path(base).exists()):
        return {}, []
    donor = read_record(folder, strict=True).get("donor")
    hub_id = donor.get("hub_id") if isinstance(donor, dict) else None
    name = str(hub_id) if hub_id else Path(base).name
    stated = json.dumps(base)
    for file in (ADAPTER_CONFIG, CARD):  # a base without "/" is not found as a path later
        texts[file] = texts[file].replace(stated, json.dumps(name))
    if hub_id:
        return ({base: name} if "/" in base else {}), []
    return ({base: name} if "/" in base else {}), [
        f"the base model {name} is only on this machine: others cannot load the adapter until it is public and "
        f"{ADAPTER_CONFIG} names it"
    ]


def _require_complete(folder: Path) -> None:
    """Raises PublishError or CheckpointError unless `folder` is a complete checkpoint or adapter."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; give the folder of a checkpoint or an adapter")
    if folder.resolve().name.endswith(PARTIAL):
        raise PublishError(
            f"{folder} is the work of a run that has not ended; finish it with --resume, then push its output"
        )
    if not any((folder / name).is_file() for name in KINDS):
        raise PublishError(f"{folder} is no checkpoint: it has neither {' nor '.join(KINDS)}")
    if is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise PublishError(f"{folder} is an adapter without its weights: there is no {ADAPTER_WEIGHTS}")
        read_header(folder / ADAPTER_WEIGHTS)
    else:
        SafetensorsSource(folder)
    require_recorded_tokenizer(folder)


def _provenance(file: Path, files: dict[str, Path | bytes]) -> bytes:
    """The published mhconvert.json, with the hashes of the published files."""
    text = files[PROVENANCE]
    hashes = read_json(file).get("sha256")
    assert isinstance(text, bytes)
    if not isinstance(hashes, dict):
        return text
    changed = {
        name: hashlib.sha256(source).hexdigest()
        for name, source in files.items()
        if isinstance(source, bytes) and name in hashes
    }
    published = {name: digest for name, digest in (hashes | changed).items() if name in files}
    return json.dumps(json.loads(text) | {"sha256": published}, indent=1).encode()
