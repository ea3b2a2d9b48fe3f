"""A conversion as one pass over the layers, healed or not, and a chain of them: what `convert` composes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.progress import Listener

STEP = ("method", "seconds")  # of each step in a chain's report


def convert(
    recipe: Recipe,
    *,
    behind: Path | None = None,
    resume: bool,
    force: bool,
    on_progress: Listener | None,
) -> dict[str, Any]:
    """The last pass of `recipe`, healed if it says so.

    Args:
        behind: the result of the passes before it; None: there are none.
    """
    if recipe.heal is None:
        return _pass(recipe, behind, resume=resume, force=force, on_progress=on_progress)
    return _and_heal(recipe, recipe.heal, behind, resume=resume, force=force, on_progress=on_progress)


def _pass(
    recipe: Recipe,
    behind: Path | None,
    *,
    step: Path | None = None,
    resume: bool,
    force: bool,
    on_progress: Listener | None,
) -> dict[str, Any]:
    """The conversion alone; `step` as `pipeline.convert_checkpoint` has it. What is recorded is the whole chain."""
    from mhconvert.convert import pipeline, planned_chain
    from mhconvert.convert.layer_pass.context import unwritten
    from mhconvert.convert.recipe.recorded import last_step
    from mhconvert.convert.storage.safetensors_reader import read_json
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.heads.measured_heads import with_measured_heads
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.eval.writing import on_policy
    from mhconvert.heal import layer_fit

    def finish(folder: Path, report: dict[str, Any]) -> None:
        if behind is not None:
            whole = recipe.to_dict()
            last_step(whole)["settings"] = report["recipe"]["settings"]
            report["recipe"] = whole
            report |= _with_earlier(report, earlier)
        write_report(folder, report)

    earlier = {} if behind is None else read_json(behind / "report.json")
    alone = recipe if behind is None else planned_chain.alone(recipe, str(behind))
    given = on_policy.check(alone)
    return pipeline.convert_checkpoint(
        alone,
        complete=with_measured_heads,
        fit=layer_fit.fit,
        measure=Fidelity,
        finish=finish,
        writing=unwritten if given is None else partial(on_policy.measure, given=given),
        step=step,
        chained=lambda own: recipe.with_last(own.settings),
        resume=resume,
        force=force,
        on_progress=on_progress,
    )


def _with_earlier(report: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """What a pass's report has of all passes up to it: time and memory, and steps, the time of each.

    earlier: the report of the pass before it.
    """
    steps = earlier.get("steps") or [{name: earlier[name] for name in STEP}]
    stages = Counter(earlier["stage_seconds"])
    stages.update(report["stage_seconds"])
    return {
        "seconds": earlier["seconds"] + report["seconds"],
        "stage_seconds": dict(stages),
        "peak_rss_bytes": max(earlier["peak_rss_bytes"], report["peak_rss_bytes"]),
        "steps": [*steps, {name: report[name] for name in STEP}],
    }


def _and_heal(
    recipe: Recipe,
    settings: HealSettings,
    behind: Path | None,
    *,
    resume: bool,
    force: bool,
    on_progress: Listener | None,
) -> dict[str, Any]:
    """Convert into OUT.unhealed, heal that into OUT, and delete it: OUT is never there before it is healed."""
    from mhconvert.api.healing import heal
    from mhconvert.convert import finished_conversion, open_model, planned_chain
    from mhconvert.convert.storage import output_folder, step_folder
    from mhconvert.convert.storage.ownership import unmark
    from mhconvert.heal import heal_text

    plain = dataclasses.replace(recipe, heal=None)
    output = open_model.output_folder(plain)
    step = step_folder.unhealed(output)
    done = resume and not force and finished_conversion.healed_report(output, plain, settings)
    if done:  # an earlier run was killed when OUT had its name
        unmark(output)
        step_folder.remove_step(step)
        return done
    step_folder.check_step(output, step, *planned_chain.read_folders(recipe), resume=resume, force=force)
    if not (resume and finished_conversion.require_result(step, plain, force=force)):
        heal_text.check(settings)
        output_folder.ResumableFolder(output, "heal", "").require_usable(resume=resume, force=force)
        _pass(plain, behind, step=step, resume=resume, force=force, on_progress=on_progress)
        resume, force = False, True  # what was trained so far began with another conversion
    report = heal(
        str(step),
        settings,
        output=str(output),
        resume=resume,
        force=force,
        verify=recipe.verify,
        trust_remote_code=recipe.trust_remote_code,
        on_progress=on_progress,
    )
    step_folder.remove_step(step)
    return report


def chain(recipe: Recipe, *, resume: bool, force: bool, on_progress: Listener | None) -> dict[str, Any]:
    """Convert by each method of `recipe` in turn; the steps before the last are in OUT.step1 … until OUT is there."""
    from mhconvert.convert import finished_conversion, open_model, planned_chain
    from mhconvert.convert.storage import step_folder

    output = open_model.output_folder(recipe)
    parts = [planned_chain.part(recipe, output, count + 1) for count in range(len(recipe.passes))]
    steps = [Path(str(part.output)) for part in parts[:-1]]
    again: dict[str, Any] = {"resume": resume, "force": force, "on_progress": on_progress}
    report = finished_conversion.report_of(output, parts[-1]) if resume and not force else None
    if report is None:
        _check_chain(recipe, output, steps, resume=resume, force=force)
        report = _each_pass(parts, steps, **again)
    step_folder.end_chain(output, recipe.model)
    if recipe.heal is not None:
        step_folder.remove_step(step_folder.unhealed(output))
    return report | _with_adapter(recipe, output, **again)


def _each_pass(
    parts: list[Recipe], steps: list[Path], *, resume: bool, force: bool, on_progress: Listener | None
) -> dict[str, Any]:
    """Every pass whose result is not there; what an earlier run left behind the first of them is of another donor."""
    from mhconvert.convert import finished_conversion

    behind: Path | None = None
    for part, step in zip(parts, steps, strict=False):
        if not (resume and finished_conversion.require_result(step, part, force=force)):
            _pass(part, behind, step=step, resume=resume, force=force, on_progress=on_progress)
            resume, force = False, True
        behind = step
    return convert(parts[-1], behind=behind, resume=resume, force=force, on_progress=on_progress)


def _check_chain(recipe: Recipe, output: Path, steps: list[Path], *, resume: bool, force: bool) -> None:
    """Raise MhconvertError for whatever the chain would refuse later, without reading weights."""
    from mhconvert.convert import planned_chain
    from mhconvert.convert.storage import disk_space, output_folder, step_folder, whole_folder
    from mhconvert.heal import heal_text

    read = planned_chain.read_folders(recipe)
    output_folder.check_free(output, force, *read)
    places, last = list(steps), "convert"
    if recipe.heal is not None:
        heal_text.check(recipe.heal)
        places, last = [*steps, step_folder.unhealed(output)], "heal"
    for step in places:
        step_folder.check_step(output, step, *read, resume=resume, force=force)
    for place, kind in (*((step, "convert") for step in places), (output, last)):
        output_folder.ResumableFolder(place, kind, "").require_usable(resume=resume, force=force)
    if recipe.adapter is not None:
        beside = Path(str(planned_chain.adapter_recipe(recipe, str(output)).output))
        output_folder.check_free(beside, force, *read)
        whole_folder.require_no_partial(beside, force=force)
    needed = planned_chain.plan(recipe, output, timed=False)["disk_needed_bytes"]
    if not resume:
        disk_space.check_space(output, needed)


def _with_adapter(
    recipe: Recipe, output: Path, *, resume: bool, force: bool, on_progress: Listener | None
) -> dict[str, Any]:
    """{"adapter": its report} where the chain ends in one, which is written beside `output`."""
    from mhconvert.convert import finished_conversion, planned_chain
    from mhconvert.convert.adapters import create

    if recipe.adapter is None:
        return {}
    asked = planned_chain.adapter_recipe(recipe, str(output))
    if resume and finished_conversion.is_result(Path(str(asked.output)), asked):
        return {"adapter": create.describe(asked)}
    return {"adapter": create.create_adapter(asked, force=force, on_progress=on_progress)}
