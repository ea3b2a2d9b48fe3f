"""What every step of a pass over the layers is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mhconvert.progress import Listener

from ..calibration.calibration_rows import Rows
from ..donor.donor import Donor
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe

Fit = Callable[..., None]  # `heal.layer_fit.fit`
Measure = Callable[[], Any]  # makes an accumulator of predictions (`eval.fidelity.Fidelity`)
Complete = Callable[[Recipe, Listener], Recipe]  # `eval.heads.measured_heads.with_measured_heads`
Writing = Callable[..., dict[str, Any]]  # `eval.writing.on_policy.measure`


def as_it_is(recipe: Recipe, _: Listener) -> Recipe:
    """The recipe, in which nothing is to be measured first."""
    return recipe


def unwritten(*_: Any, **__: Any) -> dict[str, Any]:
    """In place of a `Writing` where no tolerance is on text that the model writes."""
    raise AssertionError("this pass measures no text of the model's own")


def _no_survey() -> Any:
    raise AssertionError("this pass has no survey")


@dataclass(frozen=True)
class ConversionContext:
    """One conversion's inputs and collaborators, the same for all of its layers.

    Args:
        recipe: What is converted, how, and at which budget.
        donor: The original model, read one layer at a time.
        device: Where a layer is computed.
        dtype: Of the written weights.
        rows: Calibration and held-out token ids, each (rows, length).
        fit: Trains a converted attention in place.
        measure: Makes an accumulator of predictions.
        on_progress: Is told how far the work is.
        needs: The survey's result for every layer, made when it is first asked for.
        chain_began: The donor of the first step where the donor is itself a result; None: it is the first.
    """

    recipe: Recipe
    donor: Donor
    device: torch.device
    dtype: torch.dtype
    rows: Rows
    fit: Fit
    measure: Measure
    on_progress: Listener
    needs: Callable[[], Any] = field(default=_no_survey)
    chain_began: Donor | None = None

    @property
    def layers(self) -> int:
        """The donor's number of decoder layers."""
        return int(self.donor.config.num_hidden_layers)

    @property
    def first(self) -> Donor:
        """The donor that the result is compared with."""
        return self.chain_began or self.donor

    @cached_property
    def rotary(self) -> torch.nn.Module:
        """The donor's rotary embedding on the device."""
        return self.donor.rotary(self.device)

    def with_recipe(self, recipe: Recipe) -> ConversionContext:
        """The same for another recipe, such as one at another budget."""
        return dataclasses.replace(self, recipe=recipe)

    def planned_method(self) -> Method:
        """The recipe's method, with its budget divided over the layers where layers may differ."""
        recipe = self.recipe
        assert not isinstance(getattr(recipe.settings, "protect", None), str), "heads are measured before"
        method = build_method(recipe.method, self.donor.config, recipe.settings, recipe.effort)
        if method.divisible:
            method.share_out(self.needs())
        return method
