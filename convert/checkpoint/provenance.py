"""The files of a checkpoint besides the weights: config and code, tokenizer, and the record of its origin."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports

from mhconvert.errors import CheckpointError
from mhconvert.library_versions import versions

from ..donor.donor import Donor
from ..donor.hub_download import NAMED_TEMPLATES
from ..donor.tokenizer_files import TOKENIZER, require_tokenizer
from ..methods.registry import Method
from ..recipe.recorded import RECORD, SAVED, save_values
from ..recipe.tolerance import OWN_PROMPTS
from ..storage.atomic_files import sha256, write_json
from ..storage.ownership import MARK
from ..storage.safetensors_reader import read_json
from . import fingerprint

PROVENANCE, RECIPE = RECORD, SAVED
EVALUATION = "evaluation.json"  # written by `mhconvert eval --record`, for the card on the Hub


def write_config(folder: Path, method: Method, donor: Donor, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and generation settings; see `write_model_config`."""
    donor.copy_files(folder)
    write_model_config(folder, method.finish(), method.model_class, dtype)
    if not (folder / "generation_config.json").is_file():
        donor.generation_config().save_pretrained(folder)


def try_config(example: Any, model: Any, donor: Donor, dtype: torch.dtype) -> None:
    """Write and reload the config of a converted model in a temporary folder, and read its generation settings.

    Args:
        example: a config of the planned size.
        model: the class of the converted model.

    Raises:
        CheckpointError: transformers would write or read one of them only with an error.
    """
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as place:
        folder, tried = Path(place), "config.json"
        try:
            write_model_config(folder, example, model, dtype)
            type(example).from_pretrained(folder)
            if donor.generation_file is not None:
                tried = donor.generation_file.name
                donor.generation_config()  # whose errors name the field
                GenerationConfig.from_pretrained(donor.folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise CheckpointError(
                f"the converted model would not load with the {tried} of {donor.folder}: "
                f"{' '.join(str(error).split())[:300].rstrip('.')}; correct that file"
            ) from error


def write_model_config(folder: Path, config: Any, model: Any, dtype: torch.dtype) -> None:
    """Write config.json; `auto_map`, and the files that it points to, for a model class of mhconvert alone."""
    config.dtype = dtype
    config.architectures = [model.__name__]
    vars(config).pop("auto_map", None)  # the donor's, whose code no result needs
    if auto_map := write_code(folder, type(config), model):
        config.auto_map = auto_map
    config.save_pretrained(folder)


def write_code(folder: Path, config: Any, model: Any) -> dict[str, str]:
    """Write the files that define the classes `config` and `model`; returns their `auto_map`, {} for stock classes."""
    if not needs_remote_code(model):
        return {}
    files = [Path(inspect.getfile(kind)) for kind in (config, model)]
    for file in shipped_files(model.__module__) | {files[0]}:
        (folder / file.name).write_bytes(file.read_bytes())
    return {
        "AutoConfig": f"{files[0].stem}.{config.__name__}",
        "AutoModel": f"{files[1].stem}.{model.decoder_class.__name__}",
        "AutoModelForCausalLM": f"{files[1].stem}.{model.__name__}",
    }


def shipped_files(module: str) -> set[Path]:
    """The file of a modeling module and those that it imports, as they lie side by side in a checkpoint.

    A module that imports from another folder only lends what is there: its place is taken by the file that it names.
    """
    spec = importlib.util.find_spec(module)
    file = Path(str(spec and spec.origin))
    names = get_relative_imports(file)
    package = module.rpartition(".")[0]
    found = (shipped_files(importlib.util.resolve_name(f".{name}", package)) for name in names)
    own = set() if any(name.startswith(".") for name in names) else {file}
    return own.union(*found)


def needs_remote_code(model_class: Any) -> bool:
    """Whether a checkpoint of this class needs the files that define it: true for every class of mhconvert."""
    return not model_class.__module__.startswith("transformers.")


def write_provenance(folder: Path, donor: Donor, report: dict[str, Any]) -> None:
    """Write recipe.yaml, and mhconvert.json with the recipe as run and the results of each layer; where the budget was
    searched, the tolerance that it was searched for, and the digest of the prompts of one on generation; where it
    counts for one length of text, that length; the steps before this one. `donor`: of the first of them."""
    save_values(report["recipe"], folder / RECIPE)
    more = {"tolerance": report["tolerance"]["asked"]} if report.get("tolerance") else {}
    more |= {"prompts": report["on_policy"]["digest"]} if "on_policy" in report else {}
    more |= {name: report[name] for name in ("chain", "cache_context") if report.get(name)}
    record(folder, donor, recipe=report["recipe"], **more, layers=report["layers"])


def prompts_digest(file: Path | None) -> str:
    """What tells the prompts of a tolerance from others: the SHA-256 of their file, OWN_PROMPTS for our own."""
    if file is None:
        return OWN_PROMPTS
    return sha256(file) if file.is_file() else ""


def record(folder: Path, donor: Donor, **facts: Any) -> None:
    """Write mhconvert.json with `facts`, the donor, the versions of libraries, and the hashes of the folder's files;
    with a recipe in `facts` also the fingerprint of its model, where that is here."""
    origin = {"reference": donor.reference, "hub_id": donor.hub_id, "licence": donor.licence}
    common = {"donor": origin, "versions": versions(), "sha256": hashes(folder)}
    if recipe := facts.get("recipe"):
        common["model_fingerprint"] = fingerprint.of_local(recipe["model"])
    write_json(folder / PROVENANCE, facts | common)


def read_record(folder: Path, *, strict: bool = False) -> dict[str, Any]:
    """The contents of the folder's mhconvert.json; {} if there is none.

    Args:
        strict: whether a damaged file is an error; otherwise it counts as none.

    Raises:
        CheckpointError: the file is damaged and `strict` is set.
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


def recorded_donor(folder: Path) -> dict[str, Any]:
    """What mhconvert.json says of the donor: reference, hub_id, licence and more; {} if there is nothing.

    Raises:
        CheckpointError: it is of another type.
    """
    donor = read_record(folder).get("donor")
    if donor is None:
        return {}
    names = ("reference", "hub_id", "licence")
    if not isinstance(donor, dict) or not all(isinstance(donor.get(name), str | None) for name in names):
        raise CheckpointError(
            f"{folder / PROVENANCE}: donor is to be an object with texts as {', '.join(names)}"
        )
    return donor


def recorded_context(folder: Path) -> int | None:
    """Tokens for which the cache of the folder's model was planned; None where it was for any number."""
    context = read_record(folder).get("cache_context")
    return context if isinstance(context, int) and context > 0 else None


def require_recorded_files(folder: Path) -> None:
    """Raises CheckpointError for a file that has no longer the SHA-256 in mhconvert.json; cards may be edited."""
    recorded = read_record(folder, strict=True).get("sha256")
    for name, expected in (recorded if isinstance(recorded, dict) else {}).items():
        if name.endswith(".md"):
            continue
        file = folder / name
        if not file.is_file():
            raise CheckpointError(
                f"{file} is gone, and {folder / PROVENANCE} records it; take the folder anew"
            )
        if sha256(file) != expected:
            raise CheckpointError(
                f"{file} was changed after mhconvert wrote it: its SHA-256 is not the one in {folder / PROVENANCE}; "
                "take the folder anew, or delete that record's sha256 if the change is meant"
            )


def require_recorded_tokenizer(folder: Path) -> None:
    """Raises CheckpointError for a tokenizer.json that is damaged, or gone where mhconvert.json records it."""
    recorded = read_record(folder).get("sha256")
    file = folder / TOKENIZER
    if isinstance(recorded, dict) and TOKENIZER in recorded and not file.exists():
        raise CheckpointError(f"{file} is gone, and {folder / PROVENANCE} records it; take the folder anew")
    require_tokenizer(folder)


def hashes(folder: Path) -> dict[str, str]:
    """file name -> SHA-256, for every file in `folder` except mhconvert.json, which records them, and the mark."""
    files = sorted((*folder.iterdir(), *folder.glob(NAMED_TEMPLATES)))
    names = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return {name: sha256(file) for name, file in names.items() if name not in (PROVENANCE, MARK)}
