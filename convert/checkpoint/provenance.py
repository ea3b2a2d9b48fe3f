"""What a checkpoint contains besides weights: config and code, tokenizer, and the record of its origin."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from mhconvert.errors import CheckpointError
from mhconvert.library_versions import versions

from ..donor.donor import Donor
from ..methods.registry import Method
from ..recipe.recipe import Recipe, save_recipe
from ..storage.atomic_files import sha256, write_json
from ..storage.safetensors_reader import read_json

PROVENANCE = "mhconvert.json"
RECIPE = "recipe.yaml"
EVALUATION = "evaluation.json"  # what `mhconvert eval --record` leaves for the card on the Hub


def write_config(folder: Path, method: Method, donor: Donor, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and generation settings; for our own classes also `auto_map` and its files."""
    donor.copy_files(folder)
    write_model_config(folder, method.finish(), method.model_class, dtype)
    if not (folder / "generation_config.json").is_file():
        donor.generation_config().save_pretrained(folder)


def write_model_config(folder: Path, config: Any, model: Any, dtype: torch.dtype) -> None:
    """config.json; where `model` is a class of ours, with `auto_map` and the files it names."""
    config.dtype = dtype
    config.architectures = [model.__name__]
    files, siblings = list[Path](), list[Path]()
    if needs_remote_code(model):
        files = [Path(inspect.getfile(kind)) for kind in (type(config), model)]
        siblings = [Path(name) for name in get_relative_import_files(files[1])]
        config.auto_map = {
            "AutoConfig": f"{files[0].stem}.{type(config).__name__}",
            "AutoModel": f"{files[1].stem}.{model.decoder_class.__name__}",
            "AutoModelForCausalLM": f"{files[1].stem}.{model.__name__}",
        }
    config.save_pretrained(folder)
    for file in {*files, *siblings}:
        (folder / file.name).write_bytes(file.read_bytes())


def needs_remote_code(model_class: Any) -> bool:
    """Whether a checkpoint of this class has to contain the files that define the class."""
    return not model_class.__module__.startswith("transformers.")


def write_provenance(folder: Path, recipe: Recipe, donor: Donor, report: dict[str, Any]) -> None:
    """mhconvert.json: the recipe as run, versions, each layer's error, and hashes of the files; recipe.yaml."""
    save_recipe(recipe, folder / RECIPE)
    record(folder, donor, recipe=report["recipe"], layers=report["layers"])


def record(folder: Path, donor: Donor, **facts: Any) -> None:
    """mhconvert.json: `facts`, the donor, versions, and hashes of the files that are there."""
    origin = {"reference": donor.reference, "hub_id": donor.hub_id, "licence": donor.licence}
    found = {"donor": origin, "versions": versions(), "sha256": hashes(folder)}
    write_json(folder / PROVENANCE, facts | found)


def read_record(folder: Path, *, strict: bool = False) -> dict[str, Any]:
    """What the folder's mhconvert.json says; {} where there is none, and where it is damaged unless `strict`.

    Raises CheckpointError for a damaged file if `strict`.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except CheckpointError:
        if strict:
            raise
        return {}


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` except mhconvert.json, which will contain them."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name != PROVENANCE)
    return {file.name: sha256(file) for file in files}
