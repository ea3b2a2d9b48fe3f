"""What a chain would do, before any weight is read: each step is planned on a checkpoint without weights.

Such a checkpoint has the config that the step before plans, its tokenizer and a record. Where a survey would divide a
budget over the layers, sizes of layers are those of equal parts, and so estimates.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mhconvert.errors import MhconvertError, UnsupportedError
from mhconvert.progress import Listener

from . import pipeline
from .checkpoint import chain, provenance
from .donor.donor import open_donor
from .layer_pass import cost_estimate, first_donor
from .layer_pass.context import Complete, Measure, as_it_is
from .methods import combinations
from .methods.registry import build_method
from .recipe.recipe import Recipe
from .recipe.steps import taking_no_codes
from .storage import output_folder, step_folder
from .storage.atomic_files import write_json

Plan = Callable[[Recipe], dict[str, Any]]
SURVEYED = "the survey is of {}, the first step; what follows is planned on equal parts of its budget"
OF_BOTH_ENDS = ("kv_elements_per_token", "kv_bytes_per_token", "parameters")


def plan(
    recipe: Recipe,
    output: Path,
    *,
    surveyed: Measure | None = None,
    complete: Complete = as_it_is,
    timed: bool = True,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """The plan of the chain `recipe`, which writes `output`: that of its last pass, from the first donor on, with
    steps (the plan of each pass), the most disk and memory that is needed at once, and the adapter behind it.

    Args:
        surveyed, complete: as in `pipeline.plan`, of the first step: of others there are no weights.
        timed: as in `pipeline.plan`.

    Raises:
        MhconvertError: whatever a step refuses without weights.
    """
    with tempfile.TemporaryDirectory(prefix="mhconvert-") as place:
        unsurveyed = partial(pipeline.plan, timed=timed, on_progress=on_progress)
        first = partial(unsurveyed, surveyed=surveyed, complete=complete)
        plans = list(_plans(recipe, output, Path(place), first, unsurveyed))
    adapter = {"adapter": plans.pop()} if recipe.adapter else {}
    whole = _whole(recipe, plans)
    if surveyed is not None and len(plans) > 1:
        whole["notice"] = "; ".join(filter(None, (whole.get("notice"), SURVEYED.format(plans[0]["method"]))))
    return whole | adapter


def _plans(
    recipe: Recipe, output: Path, place: Path, planned_first: Plan, planned: Plan
) -> Iterator[dict[str, Any]]:
    """The plan of each pass, and of the adapter; donors are written into folders below `place`."""
    donor, behind, passes, read = recipe.model, "", len(recipe.passes), read_folders(recipe)
    for count in range(1, passes + 1):
        step = alone(part(recipe, output, count), donor)
        output_folder.check_free(Path(str(step.output)), True, *read)
        with _named(donor, behind):
            if behind and (reason := chain.refusal(Path(donor), step)) is not None:
                raise UnsupportedError(reason)
            sizes = (planned if behind else planned_first)(step)
        yield sizes | {"donor": behind or recipe.model} | _elements(recipe, count, sizes)
        if count < passes or recipe.adapter is not None:
            donor = _without_weights(step, part(recipe, output, count), sizes, place / str(count))
            behind = sizes["output"]
    if recipe.adapter is not None:
        from .adapters.create import describe

        asked = adapter_recipe(recipe, str(output))
        output_folder.check_free(Path(str(asked.output)), True, *read)
        with _named(donor, behind):
            adapter = describe(dataclasses.replace(asked, model=donor))
        yield adapter | {"donor": str(output)}


def _elements(recipe: Recipe, count: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """The notice of the plan `sizes` of pass `count`, where a later one takes no codes."""
    own, *later = recipe.passes[count - 1 :]
    needing = taking_no_codes(later) if combinations.kind(own.method, own.settings) == "mla" else None
    if needing is None:
        return {}
    words = f"the cache has elements of 16 bits (--kv-bits 16): {needing}, which follows, takes no codes"
    return {"notice": "; ".join(filter(None, (sizes.get("notice"), words)))}


@contextmanager
def _named(folder: str, output: str) -> Iterator[None]:
    """A context whose errors name `output`, which a step would make, instead of the folder without weights for it."""
    try:
        yield
    except MhconvertError as error:
        if not output or folder not in str(error):
            raise
        raise type(error)(str(error).replace(folder, output)) from error


def part(recipe: Recipe, output: Path, count: int) -> Recipe:
    """The recipe of the first `count` passes of a chain that writes `output`, with the folder where they end."""
    place = step_folder.numbered(output, count, len(recipe.passes))
    return dataclasses.replace(recipe.part(count), output=str(place))


def alone(chained: Recipe, model: str) -> Recipe:
    """The recipe of the last pass of `chained` alone, on `model`, the result of those before it."""
    return dataclasses.replace(chained, model=model, methods=())


def read_folders(recipe: Recipe) -> set[Path]:
    """The folders that the chain reads: its donor's, and that of the donor which that was made from."""
    trust = recipe.trust_remote_code
    return first_donor.first_donor(
        open_donor(recipe.model, trust_remote_code=trust), trust_remote_code=trust
    )[1]


def adapter_recipe(recipe: Recipe, base: str) -> Recipe:
    """The recipe of the adapter behind the chain, beside its result in the folder `base`."""
    step = recipe.adapter
    assert step is not None
    return Recipe(
        base,
        step.method,
        settings=step.settings,
        output=f"{base}-{step.method}",
        seed=recipe.seed,
        trust_remote_code=recipe.trust_remote_code,
    )


def _without_weights(step: Recipe, chained: Recipe, sizes: dict[str, Any], folder: Path) -> str:
    """Write what `step` would make into `folder`, without weights; returns the folder."""
    donor = open_donor(step.model, trust_remote_code=step.trust_remote_code)
    largest = step if step.tolerance is None else step.at_budget(1.0)
    method = build_method(step.method, donor.config, largest.settings, step.effort)
    folder.mkdir()
    donor.copy_files(folder)
    dtype = cost_estimate.output_dtype(step, donor)
    provenance.write_model_config(folder, method.example_config(), method.model_class, dtype)
    steps = chain.steps(donor.folder)
    record = {"recipe": chained.to_dict(), "chain": steps, "cache_context": sizes.get("cache_context")}
    write_json(folder / provenance.PROVENANCE, record)
    return str(folder)


def _whole(recipe: Recipe, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan of all passes together."""
    first, last = plans[0], plans[-1]
    written = [sum(plan["output_bytes"] for plan in plans[:count]) for count in range(len(plans))]
    both = {
        name: {"donor": first[name]["donor"], "converted": last[name]["converted"]} for name in OF_BOTH_ENDS
    }
    seconds = Counter[str]()
    for plan in plans:
        seconds.update(plan.get("expected_seconds", {}))
    return (
        last
        | both
        | {
            "donor": recipe.model,
            "method": "+".join(plan["method"] for plan in plans),
            "disk_needed_bytes": max(
                before + plan["disk_needed_bytes"] for before, plan in zip(written, plans, strict=True)
            ),
            "memory_needed_bytes": max(plan["memory_needed_bytes"] for plan in plans),
            "steps": plans,
        }
        | ({"expected_seconds": dict(seconds)} if "expected_seconds" in last else {})
    )
