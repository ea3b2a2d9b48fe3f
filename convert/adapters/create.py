"""Creates an untrained adapter for a donor, which changes nothing yet. No weight of the donor is read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from mhconvert.errors import AdapterError
from mhconvert.progress import Listener, Progress, ignore

from ..checkpoint import chain, provenance
from ..donor.donor import Donor, open_donor
from ..families.facts import family_of
from ..methods.hydra import HydraConfig, HydraLayer, targets
from ..methods.refusals import require
from ..recipe.recipe import Recipe, save_recipe
from ..storage import output_folder
from ..storage.byte_size import SLACK_BYTES
from ..storage.whole_folder import whole_folder
from . import card
from .saved_adapter import WEIGHTS


def describe(recipe: Recipe) -> dict[str, Any]:
    """The modules, ranks and parameters of the adapter that `recipe` describes; its output folder is not checked."""
    return _facts(recipe, *_adapted(recipe, ignore))


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `create_adapter` would write. Writes nothing."""
    donor, model = _adapted(recipe, ignore)
    output_folder.check_free(recipe.output_folder(donor.name), True, donor.folder)
    return _facts(recipe, donor, model)


def create_adapter(
    recipe: Recipe, *, force: bool = False, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Write the adapter folder that `recipe` describes; returns its report, which is that of `plan`.

    Raises:
        MhconvertError: for what a user can correct; the output folder is then as it was before.
    """
    tell = on_progress or ignore
    donor, model = _adapted(recipe, tell)
    output = recipe.output_folder(donor.name)
    output_folder.check_free(output, force, donor.folder)
    report = _facts(recipe, donor, model)
    with whole_folder(output, report["output_bytes"] + SLACK_BYTES, force=force) as folder:
        _initialise(model, recipe.seed)
        _write(folder, recipe, donor, model, report)
    tell(Progress("done", 1, 1, str(output)))
    return report


def _adapted(recipe: Recipe, tell: Listener) -> tuple[Donor, Any]:
    """The donor, and its model with the adapter, on the meta device. Every refusal happens here."""
    donor = open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code, on_progress=tell)
    tell(Progress("donor", 1, 1, donor.notice or donor.name))
    chain.require_donor(donor.folder, recipe)
    require(donor.config, recipe.method)
    chosen, skeleton = recipe.settings, donor.skeleton()
    family = family_of(donor.config).model_type  # of a converted model its donor's, whose defaults are known
    wanted: Any = list(chosen.targets or targets.DEFAULT_TARGETS.get(family, ())) or None
    if wanted and len(wanted) == 1 and targets.means_all(wanted[0]):
        wanted = wanted[0]
    config = HydraConfig(
        task_type="CAUSAL_LM",
        r_par=chosen.r_par,
        r_seq=chosen.r_seq,
        scale=chosen.scale,
        dropout=chosen.dropout,
        target_modules=wanted,
    )
    missing = targets.unmatched(wanted, skeleton) if isinstance(wanted, list) else []
    if missing:
        raise AdapterError(targets.nothing_matches(missing, skeleton))
    return donor, get_peft_model(skeleton, config, low_cpu_mem_usage=True)


def _facts(recipe: Recipe, donor: Donor, model: Any) -> dict[str, Any]:
    """The report of an adapter before it is written."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(math.prod(shape) for shape in donor.shapes().values())
    return {
        "donor": recipe.model,
        "method": recipe.method,
        "family": donor.config.model_type,
        "output": str(recipe.output_folder(donor.name)),
        "settings": dataclasses.asdict(recipe.settings),
        "target_modules": sorted(model.peft_config["default"].target_modules),
        "modules": list(model.base_model.targeted_module_names),
        "parameters": {"base": base, "trainable": trainable, "share": trainable / base},
        "output_bytes": 4 * trainable,
    }


def _initialise(model: Any, seed: int) -> None:
    """Allocate the adapter's matrices, float32, and initialise them: A at random from `seed`, B with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, HydraLayer):
            for name in layer.adapter_layer_names:
                for adapter, matrix in getattr(layer, name).items():
                    getattr(layer, name)[adapter] = nn.Parameter(torch.empty(matrix.shape))
            layer.reset_parameters("default", generator=generator)


def save_matrices(model: Any, folder: Path) -> None:
    """Write the adapter of `model` into `folder` as peft reads it."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    matrices = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(matrices, folder / WEIGHTS, metadata={"format": "pt"})


def _write(folder: Path, recipe: Recipe, donor: Donor, model: Any, report: dict[str, Any]) -> None:
    """Write matrices, configuration, card, recipe and provenance of a new adapter into `folder`."""
    save_matrices(model, folder)
    config = model.peft_config["default"]
    config.base_model_name_or_path = donor.location
    _, _, revision = recipe.model.partition("@")
    config.revision = revision or None if donor.hub_id else None
    config.inference_mode = True
    card.write(folder, Path(report["output"]).name, donor, card.about_new(report))
    config.save_pretrained(str(folder))
    save_recipe(recipe, folder / provenance.RECIPE)
    provenance.record(
        folder, donor, recipe=recipe.to_dict(), modules=report["modules"], peft=peft.__version__
    )
