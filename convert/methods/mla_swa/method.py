"""Coded latents with windows as the pass over the layers sees them: both are planned together, then layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mhconvert.errors import BudgetError

from ..layer_kinds import CODES, FULL, WINDOWED, layer_kind
from ..layer_sensitivity import LayerSensitivity
from ..mla.bit_allocation import allocate, expected_divergence, most_bytes
from ..mla.code_basis import LayerBases
from ..mla.code_plan import planned_bits
from ..mla.coded_method import BUDGET_BYTES, CodedMLA
from ..refusals import require
from ..swa.modeling_swa import in_window
from ..swa.window_plan import (
    Windows,
    asked_window,
    every_layer_windowed,
    held_tokens,
    with_full_layers,
    with_planned_windows,
)
from .settings import MLASWASettings
from .window_bits import choose


class WindowedCodedMLA(CodedMLA):
    """Attention whose cache is the code of one latent a layer; in some layers of a window and the first tokens."""

    def __init__(self, config: Any, settings: MLASWASettings, effort: str):
        """Raises UnsupportedError or BudgetError before any weight is read."""
        require(config, "mla+swa")
        super().__init__(config, settings, effort)
        window = asked_window(config, settings)
        plan = every_layer_windowed(config, window, settings.context, keeps_first=True)
        if settings.full_layers is not None:
            plan = with_full_layers(plan, settings.full_layers)
        if settings.plan is not None:
            plan = with_planned_windows(plan, [layer["window"] for layer in settings.plan])
        self.plan = plan
        self.cache_context, self.least_row = plan.context, plan.window + 1
        self.held = held_tokens(plan.window, plan.context)  # of a windowed layer
        self.windows: Windows = [None] * config.num_hidden_layers
        self.costs: list[dict[str, float]] = [{} for _ in self.windows]
        if plan.fixed is None:
            self.survey_shares = (1.0,)
        else:
            self._set_windows(
                [index in set(plan.free) - set(plan.fixed) for index in range(len(self.windows))]
            )
        self.donor_bytes = self.elements * BUDGET_BYTES * plan.donor_tokens()
        most = most_bytes(1, self.elements, max(self.widths)) * sum(self.cached())
        self.total = min(int(settings.kv_budget * self.donor_bytes), most)
        self._require_total()
        if settings.plan is not None:
            unit = f"bytes of {plan.context:,} tokens"
            self.bits = planned_bits(
                settings.plan, self.elements, self.widths, self.total, self.cached(), unit
            )

    def _take_plan(self, plan: Any) -> None:
        """It is of windows too, and taken when these are known."""

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes per token of the context, all layers, rounded up."""
        used = (
            sum(b * t for b, t in zip(self.layer_bytes(), self.cached(), strict=True))
            if self.bits
            else self.total
        )
        return -(-used // self.plan.context)

    def cached(self, length: int | None = None) -> list[int]:
        """Tokens that each layer holds of a text of `length`; None: of the context."""
        windows = [window or own for window, own in zip(self.windows, self.plan.own, strict=True)]
        return self.plan.held(windows, length)

    def share_out(self, sensitivities: Sequence[LayerSensitivity]) -> None:
        """Choose the layers with windows and the bits of every component, by one price of a byte."""
        self.bases = LayerBases(sensitivities)
        spectra = [basis.divergence for basis in self.bases]
        if self.plan.fixed is None:
            self._choose(sensitivities, spectra)
        elif self.settings.plan is None:
            self.bits = allocate(spectra, self.total, self.widths, self.cached())
        for costs, spectrum, bits in zip(self.costs, spectra, self.bits, strict=True):
            costs[CODES] = expected_divergence([spectrum], [bits])

    def _choose(self, sensitivities: Sequence[LayerSensitivity], spectra: Sequence[Tensor]) -> None:
        free = set(self.plan.free)
        costs = [float(one.replaced_cost) if i in free else None for i, one in enumerate(sensitivities)]
        found = choose(spectra, costs, self.cached(), self.held, self.total, self.widths)
        self._set_windows(found.windowed)
        self.bits = found.bits
        self.costs = [{} if cost is None else {WINDOWED: cost} for cost in costs]
        self.notice = (
            f"windowed layers: {', '.join(str(i) for i, one in enumerate(found.windowed) if one) or 'none'}; windows "
            f"and codes are expected to cost {found.divergence:.2g} nats a token"
        )

    def layer_sizes(self, index: int) -> dict[str, Any]:
        """As of coded latents, the kind of layer, and the tokens that it caches; nothing before the choice."""
        sizes = super().layer_sizes(index)
        if not sizes:
            return {}
        held, donor = self.cached()[index], self.plan.held(self.plan.own)[index]
        share = sizes["kv_code_bytes"] * held / (self.elements * BUDGET_BYTES * donor)
        window = self.windows[index]
        kind = WINDOWED if window or self.plan.own[index] else FULL
        return sizes | layer_kind(kind, share, self.costs[index]) | {"cached_tokens": held, "window": window}

    @property
    def kind_facts(self) -> dict[str, Any]:
        """How wide a windowed layer's window is, and what stands for the tokens that it drops."""
        return {"window": self.plan.window, "sinks": "first"}

    def totals(self) -> dict[str, Any]:
        """What a plan says of the windows: {"windows": …} as of `--to swa`, without what a survey has yet to choose."""
        facts: dict[str, Any] = {"context": self.plan.context, "window": self.plan.window}
        if self.plan.fixed is not None:
            facts["full_layers"] = self.plan.full
        if self.bits:
            facts |= self.plan.facts(self.windows, self._share)
        return {"windows": facts | {"class": self.config.model_type, "sinks": "first"}}

    def observe(self, attention: Any, inputs: Tensor, rotary: Any) -> Any:
        """The projections of a donor's attention; itself in a survey of windows."""
        return attention if self.effort == "survey" else super().observe(attention, inputs, rotary)

    def convert(
        self,
        statistics: Any,
        index: int,
        inputs: Tensor,
        targets: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The coded attention of layer `index`, float32; in a survey the donor's with a window, nothing coded."""
        if self.effort == "survey":
            own = self.plan.own[index]
            return statistics if own else in_window(copy.deepcopy(statistics), self.plan.window), {}
        module: Any
        module, chosen = super().convert(statistics, index, inputs, targets, position_embeddings)
        module.cache_bytes = self.layer_bytes()[index] * self.cached()[index] / self.plan.context
        return module, chosen

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished."""
        super().restore(index, chosen)
        self.windows[index] = self.config.kv_windows[index] = chosen["window"]

    def _set_windows(self, windowed: Sequence[bool]) -> None:
        self.windows = [self.plan.window if narrow else None for narrow in windowed]
        self.config.kv_windows = list(self.windows)

    def _share(self, length: int) -> float:
        used = sum(b * t for b, t in zip(self.layer_bytes(), self.cached(length), strict=True))
        return used / (self.elements * BUDGET_BYTES * self.plan.donor_tokens(length))

    def _require_budget(self, whole: int) -> None:
        """The budget is that of a length of text: see `_require_total`."""

    def _require_total(self) -> None:
        """Raise BudgetError where the smallest codes in as many windows as there may be are over the budget."""
        full = self.cached()
        tokens = full
        if self.plan.fixed is None:
            tokens = [self.held if i in set(self.plan.free) else held for i, held in enumerate(full)]
        least = most_bytes(1, 1, min(self.widths)) * sum(tokens)
        if least > self.total:
            share = -(-10000 * least // self.donor_bytes) / 10000
            raise BudgetError(
                f"kv_budget={self.settings.kv_budget:g} gives {self.total:,} bytes at {self.plan.context} tokens, and "
                f"the smallest codes need {least:,}; the least is kv_budget={share:g}"
            )


METHOD = WindowedCodedMLA
