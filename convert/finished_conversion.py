"""Whether a folder holds what a conversion would write: what a resumed run, or a recipe's, need not do again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhconvert.errors import OutputError

from . import open_model
from .checkpoint.fingerprint import of_local
from .checkpoint.provenance import prompts_digest, read_record
from .recipe.recorded import NOT_THE_RESULT, as_recorded, last_step
from .recipe.tolerance import OWN_PROMPTS, parse, prompts_file
from .storage.safetensors_reader import read_json

if TYPE_CHECKING:
    from .recipe.heal_settings import HealSettings
    from .recipe.recipe import Recipe


def is_result(folder: Path, recipe: Recipe) -> bool:
    """Whether the conversion `recipe` made what is in `folder`, healed or not."""
    return differing(folder, recipe) is None


def differing(folder: Path, recipe: Recipe) -> str | None:
    """The first key in which `recipe` is not the conversion that made `folder`, healed or not; "donor" where its model
    has other files now; None: it is."""
    record = read_record(folder)
    made = as_recorded(record.get("recipe"))
    if not isinstance(made, dict):
        return "recipe"
    if recipe.tolerance is not None:  # the search found the budget
        asked = str(parse(recipe.tolerance))
        if record.get("tolerance", asked) != asked:
            return "tolerance"
        if record.get("prompts", OWN_PROMPTS) != prompts_digest(prompts_file(recipe.prompts)):
            return "prompts"
        budget = made.get("settings", {}).get("kv_budget")
        recipe = recipe.at_budget(budget) if budget else recipe
    wanted = json.loads(json.dumps(recipe.to_dict()))
    ran, chosen = (last_step(values).get("settings") or {} for values in (made, wanted))
    protect = ran.get("protect")
    if isinstance(protect, dict) and protect.get("from") == chosen.get("protect"):
        chosen["protect"] = protect  # heads that were measured for the recipe's word
    keys = [key for key in {**wanted, **made} if key not in NOT_THE_RESULT]
    other = next((key for key in keys if made.get(key) != wanted.get(key)), None)
    return "donor" if other is None and _other_donor(record, recipe.model) else other


def _other_donor(record: dict[str, Any], model: str) -> bool:
    """Whether `model` is known to have other files than what `record` is of; versions before 0.3.0 do not say."""
    recorded = record.get("model_fingerprint")
    return recorded is not None and of_local(model) not in (None, recorded)


def require_result(step: Path, recipe: Recipe, *, force: bool) -> bool:
    """Whether `step` is there, made by the conversion `recipe`. Raises OutputError where another one made it, unless
    with `force`."""
    other = differing(step, recipe)
    if other is not None and read_record(step) and not force:
        raise OutputError(
            f"{step} was made with another {other}; --resume needs the same command, --force starts over"
        )
    return other is None


def written(recipe: Recipe) -> str | None:
    """The folder that the conversion `recipe` has written, if it has and nothing has healed it."""
    folder = open_model.output_folder(recipe)
    return str(folder) if is_result(folder, recipe) and not read_record(folder).get("healed") else None


def report_of(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The report of the conversion `recipe`, healed if it says so, that made `folder`; None where it did not."""
    plain = dataclasses.replace(recipe, heal=None)
    if recipe.heal is not None:
        return healed_report(folder, plain, recipe.heal)
    made = is_result(folder, plain) and not read_record(folder).get("healed")
    return read_json(folder / "report.json") if made else None


def healed_report(folder: Path, recipe: Recipe, settings: HealSettings) -> dict[str, Any] | None:
    """The report of the conversion `recipe` that was healed by `settings` into `folder`; None where there is none."""
    healed = read_record(folder).get("healed")
    if not (healed and is_result(folder, recipe)) or settings.same_run(healed[-1]["settings"]):
        return None
    return read_json(folder / "report.json")
