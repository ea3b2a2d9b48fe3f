"""Reads a saved adapter: the matrices that it has for each module of its base model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import Tensor

from mhconvert.errors import CheckpointError, MhconvertError, UnsupportedError
from mhconvert.progress import Listener, Progress

from ..donor.aliases import ALIASES, WHEEL_MODELS
from ..donor.donor import Donor, open_donor
from ..methods import hydra
from ..methods.hydra.branches import Branches
from ..methods.refusals import refusals
from ..storage.folder_kind import ADAPTER_CONFIG, is_adapter
from ..storage.output_folder import check_free
from ..storage.regular_file import require_regular
from ..storage.safetensors_header import StoredTensor, read_header
from ..storage.safetensors_reader import read_json, read_tensor
from ..validation.field_types import require_types
from .lora_rules import lora_scale, require_plain

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRIX = re.compile(r"(?P<module>.+)\.(?P<part>hydra_(?:par|seq)_[AB]|lora_[AB]\.(?:weight|bias))")
PAIRS = {"par": ("hydra_par_A", "hydra_par_B"), "seq": ("hydra_seq_A", "hydra_seq_B")}
LORA_PAIR = ("lora_A.weight", "lora_B.weight")
LORA_BIAS = "lora_B.bias"
TYPED = ("layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora", "lora_bias")


@dataclass
class AdapterFolder:
    """A saved adapter of a kind that can be merged; its weights are read when they are needed.

    Attributes:
        folder: of the adapter.
        config: of peft.
        method: "hydra" or "lora".
        base: a reference to its base model.
        modules: by module name and part (such as hydra_par_A), the key of the stored tensor.
        replaced: by name of a base tensor, the key of the one trained in its place (`modules_to_save`, biases).
    """

    folder: Path
    config: Any
    method: str
    base: str
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The header entry of each tensor, by its key. Raises CheckpointError where there is no safetensors file."""
        require_regular(self.file)
        if not self.file.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            hint = (
                "; load it with peft where you trust it, and save_pretrained writes safetensors"
                if pickled
                else ""
            )
            raise CheckpointError(f"{self.folder} holds no {WEIGHTS}{hint}")
        return read_header(self.file)

    def read(self, key: str) -> Tensor:
        """The tensor on the CPU. Raises CheckpointError where it holds NaN or infinity."""
        return read_tensor(key, self.stored[key])

    def branches(self, module: str) -> Branches:
        """The matrices and the scale of the adapter on `module`."""
        parts = self.modules[module]
        if self.method == "lora":
            down, up = (self.read(parts[part]) for part in LORA_PAIR)
            return Branches(lora_scale(self.config, module, len(down)), (down, up))
        pairs = {
            name: (self.read(parts[down]), self.read(parts[up])) if down in parts else None
            for name, (down, up) in PAIRS.items()
        }
        return Branches(self.config.scale, **pairs)

    def added_bias(self, module: str) -> Tensor | None:
        """What a LoRA adds to the bias of `module`; None where it has no bias."""
        key = self.modules[module].get(LORA_BIAS)
        if key is None:
            return None
        rank = self.stored[self.modules[module][LORA_PAIR[0]]].shape[0]
        return lora_scale(self.config, module, rank) * self.read(key)


def open_adapter(reference: str, base: str | None = None) -> AdapterFolder:
    """The saved adapter in the folder `reference`.

    Args:
        base: a reference to its base model; None: the one that it names.
    Raises:
        CheckpointError: for a folder that is no adapter, or a damaged one.
        UnsupportedError: for one of a kind that cannot be merged.
    """
    folder = Path(reference).expanduser()
    require_regular(folder / ADAPTER_CONFIG)
    if not is_adapter(folder):
        kind = (
            "is a model, not an adapter" if (folder / "config.json").is_file() else f"has no {ADAPTER_CONFIG}"
        )
        raise CheckpointError(f"{folder} {kind}; name the folder of a saved adapter")
    stated = read_json(folder / ADAPTER_CONFIG)
    kind = str(stated.get("peft_type", "unknown"))
    if kind not in ("HYDRA", "LORA"):
        raise UnsupportedError(f"{folder} is a {kind} adapter; mhconvert reads Hydra and LoRA")
    if kind == "HYDRA":
        hydra.register()  # peft reads its configs then
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except MhconvertError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} cannot be read: {' '.join(str(error).split())}"
        ) from error
    require_types(config, TYPED, folder / ADAPTER_CONFIG)
    if isinstance(config, LoraConfig):
        require_plain(config, folder)
    adapter = AdapterFolder(folder, config, kind.lower(), base or _base_of(config, folder))
    for key in adapter.stored:
        _sort_in(adapter, key)
    if not adapter.modules and not adapter.replaced:
        raise CheckpointError(f"{adapter.file} holds no tensors")
    return adapter


def open_base(adapter: AdapterFolder, tell: Listener, *, trust_remote_code: bool) -> Donor:
    """The base model of `adapter`.

    Raises:
        UnsupportedError: for a base model that nothing can be merged into, such as a quantised one.
    """
    donor = open_donor(adapter.base, trust_remote_code=trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    reason = refusals(donor.config)["hydra"]
    if reason is not None:
        raise UnsupportedError(f"{donor.reference} cannot take an adapter in: {reason}")
    return donor


def output_folder(output: str | None, suffix: str, adapter: AdapterFolder, donor: Donor, force: bool) -> Path:
    """The folder to write: `output`, or ./<adapter>-<suffix>. Raises OutputError where it may not be written."""
    place = Path(output) if output else Path(f"{adapter.folder.resolve().name}-{suffix}")
    check_free(place, force, donor.folder, adapter.folder)
    return place


def _sort_in(adapter: AdapterFolder, key: str) -> None:
    """Enter the stored tensor `key` under the module that it adapts, or under the base tensor that it replaces."""
    name = key.removeprefix(PREFIX)
    match = MATRIX.fullmatch(name)
    if match and match["part"].startswith(f"{adapter.method}_"):
        adapter.modules.setdefault(match["module"], {})[match["part"]] = key
    else:
        adapter.replaced[name.replace(".base_layer.", ".")] = key


def _base_of(config: Any, folder: Path) -> str:
    """A reference to the base model that the adapter names: its alias where that has weights outside the Hub."""
    name = config.base_model_name_or_path
    if not name or not isinstance(name, str):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base model; say which one it is with --base"
        )
    aliases = {hub_id: alias for alias, hub_id in ALIASES.items() if alias in WHEEL_MODELS}
    if name in aliases and not config.revision:
        return aliases[name]
    local = Path(name).expanduser().exists()  # peft writes revision "main" beside a folder too
    return f"{name}@{config.revision}" if config.revision and not local else name
