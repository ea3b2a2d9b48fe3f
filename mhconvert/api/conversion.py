"""A converted checkpoint from a donor: conversion and healing, and what they would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert.convert.methods.registry import ADAPTERS
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, ignore


def convert(
    recipe: Recipe, *, resume: bool = False, force: bool = False, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; the donor is only read.

    Args:
        recipe: what is converted and how; with `recipe.heal` the converted checkpoint is healed too.
        resume: continue an interrupted run of the same recipe in `OUT.partial`.
        force: replace an existing output folder.
        on_progress: called with the progress.

    Returns:
        The report, also `report.json` in the folder; with `recipe.heal` that of `heal`. For method hydra, which writes
        an untrained adapter from the donor's shape: modules (their names) and parameters {base, trainable, share}.

    Raises:
        MhconvertError: What a user can correct. An output folder that exists afterwards is whole.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        if resume:
            raise MhconvertError(f"{recipe.method} writes an adapter at once; there is nothing to resume")
        return create.create_adapter(recipe, force=force, on_progress=on_progress)
    if recipe.heal is not None:
        return _convert_and_heal(recipe, recipe.heal, resume=resume, force=force, on_progress=on_progress)
    return _convert(recipe, resume=resume, force=force, on_progress=on_progress)


def _convert(
    recipe: Recipe, *, step: Path | None = None, resume: bool, force: bool, on_progress: Listener | None
) -> dict[str, Any]:
    """The conversion alone; `step` as `pipeline.convert_checkpoint` has it."""
    from mhconvert.convert import pipeline
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.heads.measured_heads import with_measured_heads
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.eval.writing import on_policy
    from mhconvert.heal import layer_fit

    on_policy.check(recipe)
    return pipeline.convert_checkpoint(
        recipe,
        complete=with_measured_heads,
        fit=layer_fit.fit,
        measure=Fidelity,
        finish=write_report,
        writing=on_policy.measure,
        step=step,
        resume=resume,
        force=force,
        on_progress=on_progress,
    )


def _convert_and_heal(
    recipe: Recipe, settings: HealSettings, *, resume: bool, force: bool, on_progress: Listener | None
) -> dict[str, Any]:
    """Convert into OUT.unhealed, heal that into OUT, and delete it: OUT is never there before it is healed."""
    from mhconvert.convert import finished_conversion, open_model
    from mhconvert.convert.storage import step_folder
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
    step_folder.check_step(output, step, Path(recipe.model).expanduser(), resume=resume, force=force)
    if not (resume and finished_conversion.require_result(step, plain, force=force)):
        heal_text.check(settings)
        _convert(plain, step=step, resume=resume, force=force, on_progress=on_progress)
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


def plan(recipe: Recipe, *, survey: bool = False, on_progress: Listener | None = None) -> dict[str, Any]:
    """What `convert` would do: sizes per layer, KV arithmetic, disk, memory and time needed. Writes nothing.

    The time (`expected_seconds`, without healing or a tolerance) is from half a second of products on the device.

    Args:
        recipe: what would be converted and how.
        survey: read the weights and divide the budget over the layers, as `convert` would.
        on_progress: called with the progress.

    Returns:
        The sizes, as `--dry-run --json` prints them; for method hydra the modules and parameters of the adapter.

    Raises:
        MhconvertError: What a user can correct.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        return create.plan(recipe)
    from mhconvert.convert import pipeline
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.heads.measured_heads import with_measured_heads
    from mhconvert.eval.writing import on_policy

    on_policy.check(recipe)
    if not survey:
        return pipeline.plan(recipe, on_progress=on_progress)
    return pipeline.plan(recipe, surveyed=Fidelity, complete=with_measured_heads, on_progress=on_progress)


def curve(
    recipe: Recipe,
    budgets: Sequence[float] | None = None,
    *,
    text: Path | None = None,
    sequences: int = 16,
    baselines: Sequence[str] = (),
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """What the conversion that `recipe` describes would give at each KV budget, from one pass; writes nothing.

    Args:
        recipe: what would be converted and how.
        budgets: shares of the donor's KV elements, instead of the recipe's own; None: 75 % … 12.5 %.
        text: a UTF-8 file to measure on, instead of the recipe's held-out rows.
        sequences: rows of that file, each as long as the calibration's.
        baselines: dtypes of KV caches (int8 … int2, fp8) with which the whole donor is measured on the same rows.
        on_progress: called with the progress.

    Returns:
        perplexity (the donor's), kv_elements_per_token, kv_bytes_per_token, calibration, measured_on, measured_tokens,
        and points from the largest budget down: kv_budget, kv_elements_per_token, kv_bytes_per_token, kv_share (of the
        bytes of the donor's cache at 16 bits an element), kl, perplexity, perplexity_ratio, top1_agreement,
        mean_relative_error, seconds. A point's figures are those of `convert` at that budget; they are not smoothed.
        baselines: the donor's points, with name and kv_cache_dtype for kv_budget and mean_relative_error. same_size:
        kv_budget and as, for budgets that come to the size of a smaller one and have no point of their own.

    Raises:
        MhconvertError: What a user can correct.
    """
    if recipe.method in ADAPTERS:
        raise MhconvertError(f"{recipe.method} leaves the KV cache as it is, so there is no curve of it")
    from mhconvert.convert.layer_pass import budget_curve
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.heads.measured_heads import with_measured_heads
    from mhconvert.eval.kv_cache.rivals import Beside
    from mhconvert.heal import layer_fit

    beside = Beside(recipe, text, sequences, baselines, on_progress or ignore)
    return beside.completed(
        budget_curve.measure_curve(
            recipe,
            budgets,
            fit=layer_fit.fit,
            measure=Fidelity,
            complete=with_measured_heads,
            held_out=beside.held_out,
            on_progress=on_progress,
        )
    )


def heal(
    checkpoint: str,
    settings: HealSettings,
    *,
    output: str | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = True,
    tensorboard: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Train a converted checkpoint to predict as its donor does.

    Args:
        checkpoint: a folder that `convert` wrote.
        settings: of the training.
        output: the folder; None: ./<checkpoint>-healed.
        resume: continue an interrupted run of the same settings in `OUT.partial`.
        force: replace an existing output folder.
        verify: reload the result in a bare process.
        tensorboard: a folder for a TensorBoard log.
        trust_remote_code: let a donor run its own code.
        on_progress: called with the progress.

    Returns:
        The report, also `report.json` in the folder: perplexity {donor, converted}, kl and top1_agreement on the
        held-out rows after healing, `before` with the same before it, and `healing`: settings, teacher, steps,
        trained_tokens, tokens_per_second, seconds and more. `metrics.jsonl` in the folder has every step.

    Raises:
        MhconvertError: What a user can correct. An output folder that exists afterwards is whole.
    """
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.report import curve_plot
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.heal import run
    from mhconvert.heal.open_models import Run

    def finish(folder: Path, report: dict[str, Any]) -> None:
        if settings.tokens:
            report["healing"]["plot"] = curve_plot.write_healing(folder)
        write_report(folder, report)

    place = Path(output) if output else Path(f"{Path(checkpoint).resolve().name}-healed")
    asked = Run(checkpoint, settings, place, resume, force, verify, tensorboard, trust_remote_code)
    return run.run(asked, measure=Fidelity, finish=finish, on_progress=on_progress)
