"""A recipe's stages in their order: convert, heal, evaluate, export, push. One that is done is not done again.

    recipe ─▶ OUT ─▶ OUT-healed ─▶ evaluation.json and pages in it ─▶ OUT-<form> ─▶ the Hub

What a stage depends on is hashed: its part of the recipe and the model that it begins with.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhconvert import api
from mhconvert.convert import load
from mhconvert.convert.checkpoint import is_adapter
from mhconvert.convert.donor import open_donor
from mhconvert.convert.errors import OutputError, RecipeError
from mhconvert.convert.progress import Listener, Progress
from mhconvert.convert.provenance import EVALUATION, PROVENANCE, sha256
from mhconvert.convert.sources import read_json
from mhconvert.eval import page
from mhconvert.eval.comparison import Settings
from mhconvert.eval.harness import Options
from mhconvert.eval.tasks import TaskChoice
from mhconvert.run.ledger import Ledger, mark
from mhconvert.run.recipe import RunRecipe
from mhconvert.run.settings import EvalStage

PAGES = ("evaluation.html", "evaluation.md")
ELSEWHERE = ("output", "device", "verify", "max_shard_size")  # keys that do not change what a model is


@dataclass
class Run:
    """A recipe on its way. force: stages run though they are done. results: each stage's status, output and figures."""

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


def run(
    recipe: RunRecipe,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    on_progress: Listener,
) -> dict[str, Any]:
    """Do the recipe's stages, or of them `only` those named; returns output, stages and the evaluation's result.

    dry_run: nothing is done, and each stage's status says whether it would be. A stage that is interrupted is resumed
    by the next run. Raises MhconvertError; RecipeError for a stage that the recipe does not have, or whose model is
    not there.
    """
    for name in only:
        if name not in recipe.stages:
            raise RecipeError(f"the recipe has no stage '{name}'; it has {', '.join(recipe.stages)}")
    output = output_folder(recipe)
    work = Run(recipe, output, Ledger(output), force, on_progress, [])
    for name in recipe.stages:
        if only and name not in only:
            continue
        inputs = _inputs(work, name)
        entry = None if force or inputs is None else _done(work, name, inputs)
        if entry is not None:
            work.results.append({"stage": name, "status": "skipped", **_kept(name, entry)})
        elif dry_run:
            work.results.append({"stage": name, "status": "to do", "output": _place(work, name)})
        else:
            _do(work, name)
    evaluation = next((each.pop("result") for each in work.results if "result" in each), None)
    return {"output": str(work.final), "stages": work.results, "evaluation": evaluation}


def output_folder(recipe: RunRecipe) -> Path:
    """Where the conversion goes."""
    named = recipe.convert.output
    return Path(named) if named else recipe.convert.output_folder(open_donor(recipe.convert.model).name)


def _do(work: Run, name: str) -> None:
    inputs = _inputs(work, name)
    if inputs is None:
        raise RecipeError(
            f"{name} needs the checkpoint {_begins_with(work, name)}, which is not there; run that stage too"
        )
    work.tell(Progress("stage", 0, 1, name))
    started = time.perf_counter()
    found = STAGES[name](work)
    place = found.get("output")
    work.ledger.record(
        name, inputs, Path(place) if place and name != "push" else None, **found.pop("facts", {})
    )
    work.results.append({"stage": name, "status": "done", "seconds": time.perf_counter() - started, **found})


def _kept(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Of a stage that an earlier run did: its output, and an evaluation's figures."""
    kept = {key: value for key, value in entry.items() if key not in ("inputs", "mark")}
    if name == "eval":
        kept["result"] = json.loads(Path(entry["output"]).read_text(encoding="utf-8"))
    return kept


def _done(work: Run, name: str, inputs: Any) -> dict[str, Any] | None:
    entry = work.ledger.done(name, inputs)
    unknown = not work.ledger.known(name, work.output)
    if (
        entry is None
        and name == "convert"
        and unknown
        and load.written(_conversion(work))
        and _whole(work.output)
    ):
        return {"output": str(work.output)}  # by `mhconvert DONOR --to METHOD`, with all the same settings
    return entry


def _whole(folder: Path) -> bool:
    """Whether the files are those that the conversion wrote."""
    recorded = read_json(folder / PROVENANCE).get("sha256") or {}
    files = [name for name in recorded if name.endswith(".safetensors") or name == "config.json"]
    try:
        return all(sha256(folder / name) == recorded[name] for name in files)
    except OSError:
        return False


def _inputs(work: Run, name: str) -> Any:
    """What the stage depends on; None where the checkpoint that it begins with is not there."""
    recipe, plain = work.recipe, work.recipe.to_dict()
    if name == "convert":
        return {k: v for k, v in plain.items() if k not in (*ELSEWHERE, "heal", "eval", "export", "push")}
    begins = mark(_begins_with(work, name))
    if begins is None:
        return None
    inputs = {"model": begins, "settings": plain[name], "trust_remote_code": recipe.convert.trust_remote_code}
    if name == "eval" and recipe.convert.heal is not None:
        inputs["converted"] = mark(work.output)
    if name == "push":
        inputs["evaluation"] = mark(work.final / EVALUATION)
    return inputs


def _begins_with(work: Run, name: str) -> Path:
    return work.output if name == "heal" else work.final


def _place(work: Run, name: str) -> str:
    recipe = work.recipe
    if name == "export":
        return str(_export_folder(work))
    if name == "push":
        return recipe.push.repo if recipe.push else ""
    return str({"convert": work.output, "heal": work.healed}.get(name, work.final / EVALUATION))


def _conversion(work: Run) -> Any:
    return dataclasses.replace(work.recipe.convert, heal=None, output=str(work.output))


def _convert(work: Run) -> dict[str, Any]:
    recipe = _conversion(work)
    resume = _interrupted(work.output) and not work.force
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
    report = api.heal(
        str(work.output),
        recipe.heal,
        output=str(work.healed),
        resume=_interrupted(work.healed) and not work.force,
        force=work.force or work.ledger.known("heal", work.healed),
        verify=recipe.verify,
        trust_remote_code=recipe.trust_remote_code,
        on_progress=work.tell,
    )
    return {"output": str(work.healed), "report": report}


def _evaluate(work: Run) -> dict[str, Any]:
    recipe, stage = work.recipe.convert, work.recipe.eval
    assert stage is not None
    checkpoints = [str(work.output)] + ([str(work.healed)] if recipe.heal is not None else [])
    result = api.evaluate(
        checkpoints,
        eval_settings(stage, fresh=work.force),
        against=None if is_adapter(work.output) else recipe.model,
        record=True,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        on_progress=work.tell,
    )
    reports, _ = page.sources(result)
    text = yaml.safe_dump(work.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    for name in PAGES:
        page.write(work.final / name, result, reports, text)
    return {"output": str(work.final / EVALUATION), "result": result}


def eval_settings(stage: EvalStage, *, fresh: bool) -> Settings:
    """The stage as the settings of `mhconvert eval`. Raises MhconvertError."""
    folder = Path(stage.data).expanduser() if stage.data else None
    own = Path(stage.include_path).expanduser() if stage.include_path else None
    return Settings(
        texts=tuple(Path(name).expanduser() for name in stage.text),
        sequences=stage.sequences,
        sequence_length=stage.sequence_length,
        choice=TaskChoice(stage.tasks, stage.suite, folder, own, stage.num_fewshot),
        options=Options(
            stage.limit, stage.batch_size, stage.max_length, stage.dtype, stage.chat_template, stage.backend
        ),
        retrieval=stage.retrieval,
        fresh=fresh,
    )


def _export_folder(work: Run) -> Path:
    stage = work.recipe.export
    assert stage is not None
    return Path(stage.output) if stage.output else work.final.with_name(f"{work.final.name}-{stage.to}")


def _export(work: Run) -> dict[str, Any]:
    stage = work.recipe.export
    assert stage is not None
    place = _export_folder(work)
    report = api.export(
        str(work.final),
        stage.to,
        str(place),
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
    return output.with_name(f"{output.name}.partial").is_dir()


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "convert": _convert,
    "heal": _heal,
    "eval": _evaluate,
    "export": _export,
    "push": _push,
}
