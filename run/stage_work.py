"""What each stage of a run does: one call of the library."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from mhconvert import api
from mhconvert.errors import OutputError, PublishError, RecipeError, TextError
from mhconvert.progress import Listener

from ..convert import open_model
from ..convert.checkpoint.provenance import EVALUATION
from ..convert.methods.registry import info
from ..convert.planned_chain import adapter_recipe, read_folders
from ..convert.storage.folder_kind import is_adapter
from ..convert.storage.output_folder import PARTIAL, check_free
from ..eval import refusals
from ..eval.page import page
from ..eval.tasks.harness import require_available
from ..eval.tasks.task_choice import resolve
from ..eval.writing import prompts
from ..eval.writing.greedy_texts import without_texts
from ..heal import heal_text, resumable_run
from .ledger import Ledger
from .stage_settings import export_fault
from .whole_recipe import RunRecipe

PAGES = ("evaluation.html", "evaluation.md")


@dataclass
class Run:
    """The state of a run. force: repeat stages that are done. results: status, output and figures of each stage."""

    recipe: RunRecipe
    output: Path
    ledger: Ledger
    force: bool
    tell: Listener
    results: list[dict[str, Any]]

    @property
    def healed(self) -> Path:
        return self.output.with_name(f"{self.output.name}-healed")

    @property
    def final(self) -> Path:
        """The checkpoint that is evaluated, exported and pushed."""
        return self.output if self.recipe.convert.heal is None else self.healed


def conversion(work: Run) -> Any:
    recipe = work.recipe.convert
    return dataclasses.replace(recipe.part(len(recipe.passes)), heal=None, output=str(work.output))


def adapter(work: Run) -> Any:
    return adapter_recipe(work.recipe.convert, str(work.final))


def check_ahead(work: Run, stages: Sequence[str]) -> None:
    """Raise MhconvertError for what a later stage would refuse: missing files or libraries, tasks, a form, no token, an
    adapter in the place of a donor."""
    recipe = work.recipe
    if recipe.convert.adapter is not None and "adapter" in stages:
        place = Path(adapter(work).output)
        if place.exists() and not work.ledger.known("adapter", place):
            check_free(place, True, *read_folders(recipe.convert))
    if recipe.convert.heal is not None and "heal" in stages:
        heal_text.check(recipe.convert.heal)
    if recipe.eval is not None and "eval" in stages:
        settings = recipe.eval
        require_available(settings)
        for text in settings.text_files:
            if not text.is_file():
                raise TextError(f"text file {text} of the recipe's eval is not there")
        prompts.asked(settings)
        refusals.asked(settings)
        if settings.has_tasks:
            with tempfile.TemporaryDirectory(prefix="mhconvert-tasks-") as folder:
                resolve(settings, Path(folder))
    if recipe.export is not None and "export" in stages:
        fault = export_fault(recipe.convert.method, recipe.export)
        if fault is not None:
            raise RecipeError(f"export.{fault[1]}")
    if recipe.push is not None and "push" in stages and get_token() is None:
        raise PublishError("the recipe pushes, and there is no token: run 'hf auth login', or set HF_TOKEN")


def _convert(work: Run) -> dict[str, Any]:
    recipe = conversion(work)
    resume = (bool(recipe.methods) or _interrupted(work.output)) and not work.force
    if work.output.exists() and not work.force:
        raise OutputError(
            f"{work.output} is there already and is not what this recipe makes; --force replaces it, --set output=OUT "
            "writes another"
        )
    report = api.convert(recipe, resume=resume, force=work.force, on_progress=work.tell)
    return {"output": str(work.output), "report": report}


def _heal(work: Run) -> dict[str, Any]:
    recipe = work.recipe.convert
    assert recipe.heal is not None
    resume, force = _interrupted(work.healed), work.ledger.known("heal", work.healed)
    trusted = recipe.trust_remote_code
    if resume:
        checkpoint = open_model.open_model(str(work.output), trust_remote_code=trusted)
        if resumable_run.began_with_another(work.healed, checkpoint):  # what was trained is not of this one
            resume, force = False, force or not work.healed.exists()
    report = api.heal(
        str(work.output),
        recipe.heal,
        output=str(work.healed),
        resume=resume and not work.force,
        force=work.force or force,
        verify=recipe.verify,
        trust_remote_code=trusted,
        on_progress=work.tell,
    )
    return {"output": str(work.healed), "report": report}


def _adapter(work: Run) -> dict[str, Any]:
    recipe = adapter(work)
    force = work.force or work.ledger.known("adapter", Path(recipe.output))
    return {"output": recipe.output, "report": api.convert(recipe, force=force, on_progress=work.tell)}


def _evaluate(work: Run) -> dict[str, Any]:
    recipe, stage = work.recipe.convert, work.recipe.eval
    assert stage is not None
    checkpoints = [str(work.output)] + ([str(work.healed)] if recipe.heal is not None else [])
    result = api.evaluate(
        checkpoints,
        stage,
        fresh=work.force,
        against=None if is_adapter(work.output) else recipe.model,
        record=True,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        on_progress=work.tell,
    )
    reports, _ = page.sources(result)
    public = result | {"generation": without_texts(result.get("generation"))}  # a push sends the pages along
    text = yaml.safe_dump(work.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    for name in PAGES:
        page.write(work.final / name, public, reports, text)
    return {"output": str(work.final / EVALUATION), "result": result}


def export_folder(work: Run) -> Path:
    """The folder of the export; of a GGUF, also where `auto` takes that for its engine, the file."""
    from ..convert.export.forms import automatic_forms

    stage = work.recipe.export
    assert stage is not None
    if stage.output:
        return Path(stage.output)
    form = stage.to
    if form == "auto" and stage.engine is not None:
        form = automatic_forms(info(work.recipe.convert.method), stage.engine)[0].name
    ending = f"{stage.kind}.gguf" if form == "gguf" else stage.to
    return work.final.with_name(f"{work.final.name}-{ending}")


def _export(work: Run) -> dict[str, Any]:
    stage = work.recipe.export
    assert stage is not None
    place = export_folder(work)
    report = api.export(
        str(work.final),
        stage.to,
        str(place),
        dtype=stage.dtype,
        kind=stage.kind,
        pad_row=stage.pad_row,
        engine=stage.engine,
        duplicate=stage.duplicate,
        force=work.force or work.ledger.known("export", place),
        trust_remote_code=work.recipe.convert.trust_remote_code,
        on_progress=work.tell,
    )
    return {"output": str(place), "report": report}


def _push(work: Run) -> dict[str, Any]:
    stage = work.recipe.push
    assert stage is not None
    sent = api.push(
        work.final, stage.repo, private=stage.private, revision=stage.revision, on_progress=work.tell
    )
    return {
        "output": sent["url"],
        "facts": {"commit": sent["commit"], "url": sent["url"]},
        "commit": sent["commit"],
    }


def _interrupted(output: Path) -> bool:
    return output.with_name(output.name + PARTIAL).is_dir()


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "convert": _convert,
    "heal": _heal,
    "adapter": _adapter,
    "eval": _evaluate,
    "export": _export,
    "push": _push,
}
