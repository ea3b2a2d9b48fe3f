"""The stages of a recipe in order: convert, heal, adapter, evaluate, export, push. Finished stages are skipped.

    recipe ─▶ OUT ─▶ OUT-healed ─▶ evaluation.json and pages in it ─▶ OUT-<form> ─▶ the Hub
                        └▶ OUT-healed-hydra, an adapter for it

A stage's inputs are hashed: its part of the recipe, the model that it starts from, and the files that it reads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert.errors import RecipeError
from mhconvert.progress import Listener, Progress

from ..convert import finished_conversion, open_model
from ..convert.checkpoint.provenance import EVALUATION, read_record
from ..convert.storage import step_folder
from ..convert.storage.atomic_files import sha256
from . import stage_inputs
from .ledger import Ledger, mark
from .stage_work import STAGES, Run, adapter, check_ahead, conversion, export_folder
from .whole_recipe import RunRecipe


def run(
    recipe: RunRecipe,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    on_progress: Listener,
) -> dict[str, Any]:
    """Run the recipe's stages in order; return output (folder), stages and the evaluation's result.

    Args:
        only: Names of the stages to run; empty: all.
        force: Repeat stages that are done.
        dry_run: Only say which stages would run.
    Raises:
        RecipeError: The recipe lacks a stage of `only`, or the checkpoint that a stage starts from does not exist.
        MhconvertError: A stage failed. An interrupted stage is resumed by the next run.
    """
    for name in only:
        if name not in recipe.stages:
            raise RecipeError(f"the recipe has no stage '{name}'; it has {', '.join(recipe.stages)}")
    output = output_folder(recipe)
    work = Run(recipe, output, Ledger(output), force, on_progress, [])
    check_ahead(work, [name for name in recipe.stages if not only or name in only])
    for name in recipe.stages:
        if only and name not in only:
            continue
        depends = _inputs(work, name)
        entry = None if force or depends is None else _done(work, name, depends)
        if entry is not None:
            if name == "convert" and recipe.convert.methods and not dry_run:
                step_folder.end_chain(output, recipe.convert.model)
            work.results.append({"stage": name, "status": "skipped", **_kept(name, entry)})
        elif dry_run:
            work.results.append({"stage": name, "status": "to do", "output": _place(work, name)})
        else:
            _do(work, name, depends)
    evaluation = next((each.pop("result") for each in work.results if "result" in each), None)
    return {"output": str(work.final), "stages": work.results, "evaluation": evaluation}


def output_folder(recipe: RunRecipe) -> Path:
    """Return the folder of the converted checkpoint."""
    named = recipe.convert.output
    return Path(named) if named else open_model.output_folder(recipe.convert)


def _do(work: Run, name: str, depends: Any) -> None:
    if depends is None:
        raise RecipeError(
            f"{name} needs the checkpoint {_begins_with(work, name)}, which is not there; run that stage too"
        )
    work.tell(Progress("stage", 0, 1, name))
    started = time.perf_counter()
    found = STAGES[name](work)
    place = found.get("output")
    work.ledger.record(
        name, depends, Path(place) if place and name != "push" else None, **found.pop("facts", {})
    )
    work.results.append({"stage": name, "status": "done", "seconds": time.perf_counter() - started, **found})


def _kept(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the output of a stage that an earlier run finished, and for an evaluation its figures."""
    kept = {key: value for key, value in entry.items() if key not in ("inputs", "mark")}
    if name == "eval":
        kept["result"] = json.loads(Path(entry["output"]).read_text(encoding="utf-8"))
    return kept


def _done(work: Run, name: str, depends: Any) -> dict[str, Any] | None:
    entry = work.ledger.done(name, depends)
    unknown = not work.ledger.known(name, work.output)
    if (
        entry is None
        and name == "convert"
        and unknown
        and finished_conversion.written(conversion(work))
        and _whole(work.output)
    ):
        return {"output": str(work.output)}  # by `mhconvert DONOR --to METHOD`, with all the same settings
    return entry


def _whole(folder: Path) -> bool:
    """Whether the checkpoint's files still have the recorded hashes."""
    recorded = read_record(folder, strict=True).get("sha256") or {}
    files = [name for name in recorded if name.endswith(".safetensors") or name == "config.json"]
    try:
        return all(sha256(folder / name) == recorded[name] for name in files)
    except OSError:
        return False


def _inputs(work: Run, name: str) -> Any:
    """Return the hashes that the stage depends on; None where the checkpoint it starts from does not exist."""
    recipe = work.recipe
    if name == "convert":
        return stage_inputs.of_conversion(recipe)
    begins = mark(_begins_with(work, name))
    if begins is None:
        return None
    trust = recipe.convert.trust_remote_code
    settings = adapter(work).to_dict() if name == "adapter" else recipe.to_dict()[name]
    found = {"model": begins, "settings": settings, "trust_remote_code": trust}
    if name == "heal":
        found |= stage_inputs.of_healing(recipe)
    if name == "eval":
        found |= stage_inputs.of_evaluation(recipe)
        found["converted"] = mark(work.output) if recipe.convert.heal is not None else None
    if name == "push":
        found["evaluation"] = mark(work.final / EVALUATION)
    return found


def _begins_with(work: Run, name: str) -> Path:
    return work.output if name == "heal" else work.final


def _place(work: Run, name: str) -> str:
    recipe = work.recipe
    if name == "export":
        return str(export_folder(work))
    if name == "push":
        return recipe.push.repo if recipe.push else ""
    if name == "adapter":
        return str(adapter(work).output)
    return str({"convert": work.output, "heal": work.healed}.get(name, work.final / EVALUATION))
