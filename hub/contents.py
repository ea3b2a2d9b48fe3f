"""What of a folder is published, and whether it may be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from mhconvert.convert.adapter.folder import WEIGHTS as ADAPTER_WEIGHTS
from mhconvert.convert.checkpoint import KINDS, is_adapter
from mhconvert.convert.errors import PublishError
from mhconvert.convert.provenance import PROVENANCE
from mhconvert.convert.sources import SafetensorsSource, read_header, read_json
from mhconvert.eval.card import CARD
from mhconvert.hub.card import published_card

# Never published: hidden files, files of a run that has not ended, trainers' states, and pickles, which run code.
LEFT_OUT = (
    ".*",
    "__pycache__",
    "*.partial",
    "*.new",
    "*.lock",
    "checkpoint-*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
)


@dataclass(frozen=True)
class Contents:
    """files: path in the repository -> the file here, or its text where the Hub gets another than lies here.

    left_out: what lies in the folder and is not published.
    """

    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.files.items()
        }


def contents(folder: Path, repo_id: str, branch: str | None) -> Contents:
    """The files of `folder` for `repo_id`, with the card as it goes there. Sends nothing.

    Raises PublishError for what is no whole checkpoint or adapter, CheckpointError for damaged files.
    """
    _require_whole(folder)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = file.relative_to(folder)
        if any(fnmatch(part, pattern) for part in place.parts for pattern in LEFT_OUT):
            left_out.append(place.as_posix())
        else:
            files[place.as_posix()] = file
    card = published_card(folder, repo_id, branch).encode()
    files[CARD] = card
    if PROVENANCE in files:
        files[PROVENANCE] = _provenance(folder / PROVENANCE, card)
    return Contents(dict(sorted(files.items())), left_out)


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


def _provenance(file: Path, card: bytes) -> bytes:
    """mhconvert.json with the hash of the card that is published beside it."""
    facts = read_json(file)
    hashes = facts.get("sha256")
    if not isinstance(hashes, dict) or CARD not in hashes:
        return file.read_bytes()
    facts["sha256"] = hashes | {CARD: hashlib.sha256(card).hexdigest()}
    return json.dumps(facts, indent=1).encode()
