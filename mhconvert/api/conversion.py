"""A converted checkpoint from a donor, and what it would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert.convert.methods.registry import ADAPTERS
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, ignore


def convert(
    recipe: Recipe, *, resume: bool = False, force: bool = False, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes; the donor is only read.

    Args:
        recipe: what is converted and how; with `recipe.heal` the converted checkpoint is healed too. The steps of
            `recipe.methods` are written into OUT.step1 …, which are gone when OUT is there.
        resume: continue an interrupted run of the same recipe in `OUT.partial`.
        force: replace an existing output folder.
        on_progress: called with the progress.

    Returns:
        The report, also `report.json` in the folder; with `recipe.heal` that of `heal`. For method hydra, which writes
        an untrained adapter from the donor's shape: modules (their names) and parameters {base, trainable, share}. Of a
        chain the report is the last pass's, compared with the first donor, with seconds of all and of each of its
        steps; adapter is that of OUT-hydra.

    Raises:
        MhconvertError: What a user can correct. An output folder that exists afterwards is whole.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        if resume:
            raise MhconvertError(f"{recipe.method} writes an adapter at once; there is nothing to resume")
        return create.create_adapter(recipe, force=force, on_progress=on_progress)
    from mhconvert.api import passes

    work = passes.chain if recipe.methods else passes.convert
    return work(recipe, resume=resume, force=force, on_progress=on_progress)


def plan(recipe: Recipe, *, survey: bool = False, on_progress: Listener | None = None) -> dict[str, Any]:
    """What `convert` would do: sizes per layer, KV arithmetic, disk, memory and time needed. Writes nothing.

    The time (`expected_seconds`, without healing or a tolerance) is from half a second of products on the device.

    Args:
        recipe: what would be converted and how.
        survey: read the weights and divide the budget over the layers, as `convert` would; of a chain that of its
            first step, in steps[0].
        on_progress: called with the progress.

    Returns:
        The sizes, as `--dry-run --json` prints them; for method hydra the modules and parameters of the adapter. Of a
        chain: from its first donor to its last pass, with steps, the plan of each, and adapter.

    Raises:
        MhconvertError: What a user can correct.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        return create.plan(recipe)
    from mhconvert.convert import open_model, pipeline, planned_chain
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.heads.measured_heads import with_measured_heads
    from mhconvert.eval.writing import on_policy

    on_policy.check(recipe)
    options: dict[str, Any] = {"surveyed": Fidelity, "complete": with_measured_heads} if survey else {}
    options["on_progress"] = on_progress
    if recipe.methods:
        return planned_chain.plan(recipe, open_model.output_folder(recipe), **options)
    return pipeline.plan(recipe, **options)


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
