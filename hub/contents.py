"""Which contents of a folder are published, and whether they may be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from mhconvert.errors import PublishError

from ..convert.adapters.saved_adapter import WEIGHTS as ADAPTER_WEIGHTS
from ..convert.checkpoint.provenance import PROVENANCE, read_record
from ..convert.donor.reference import HUB_ID
from ..convert.storage.folder_kind import ADAPTER_CONFIG, KINDS, is_adapter
from ..convert.storage.safetensors_reader import SafetensorsSource, read_header, read_json
from ..eval.report.model_card import CARD
from .local_paths import Paths, is_text, read_text
from .published_card import published_card
from .published_files import sorted_out


@dataclass(frozen=True)
class Contents:
    """files: path in the repository -> the file here, or its text where the Hub gets another than lies here.

    left_out: what lies in the folder and is not published. notes: what whoever publishes it should know.
    """

    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.files.items()
        }


def contents(folder: Path, repo_id: str, branch: str | None) -> Contents:
    """The files of `folder` for `repo_id`, with the card as it goes there, and without this machine's paths.

    Sends nothing. Raises PublishError for what is no whole checkpoint or adapter, CheckpointError for damaged files.
    """
    _require_whole(folder)
    sent, left_out = sorted_out(folder)
    files: dict[str, Path | bytes] = {place.as_posix(): folder / place for place in sent}
    texts = {place: read_text(folder / place) for place in files if is_text(place) and place != CARD}
    texts[CARD] = published_card(folder, repo_id, branch)
    instead, notes = dict[str, str](), list[str]()
    if is_adapter(folder):
        instead, notes = _base(folder, texts)
    paths = Paths(folder, texts, instead)
    for place, text in texts.items():
        files[place] = paths.without(text).encode()
    if PROVENANCE in texts:
        files[PROVENANCE] = _provenance(folder / PROVENANCE, files)
    return Contents(dict(sorted(files.items())), [place.as_posix() for place in left_out], notes)


def _base(folder: Path, texts: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return replacements for an adapter's base model that is only on this machine, and a note about it."""
    base = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if not base or (HUB_ID.fullmatch(base) and not Path(base).exists()):
        return {}, []
    donor = read_record(folder, strict=True).get("donor")
    hub_id = donor.get("hub_id") if isinstance(donor, dict) else None
    name = str(hub_id) if hub_id else Path(base).name
    stated = json.dumps(base)
    for place in (ADAPTER_CONFIG, CARD):  # also a name alone, which is no path
        texts[place] = texts[place].replace(stated, json.dumps(name))
    if hub_id:
        return ({base: name} if "/" in base else {}), []
    return ({base: name} if "/" in base else {}), [
        f"the base model {name} is only on this machine: others cannot load the adapter until it is public and "
        f"{ADAPTER_CONFIG} names it"
    ]


def _require_whole(folder: Path) -> None:
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; give the folder of a checkpoint or an adapter")
    if folder.resolve().name.endswith(".partial"):
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


def _provenance(file: Path, files: dict[str, Path | bytes]) -> bytes:
    """Return mhconvert.json as it is published, with the hashes of the published files."""
    text = files[PROVENANCE]
    hashes = read_json(file).get("sha256")
    assert isinstance(text, bytes)
    if not isinstance(hashes, dict):
        return text
    changed = {
        place: hashlib.sha256(source).hexdigest()
        for place, source in files.items()
        if isinstance(source, bytes) and place in hashes
    }
    return json.dumps(json.loads(text) | {"sha256": hashes | changed}, indent=1).encode()
