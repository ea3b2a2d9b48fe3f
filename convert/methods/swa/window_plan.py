"""A budget at one length of text as a number of full layers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mhconvert.errors import BudgetError

from ...families.facts import LONGEST_CONTEXT, counted_context
from ..layer_options import LEAST_WINDOW, require_shorter
from .first_tokens import FIRST
from .settings import SWASettings
from .targets import own_windows

# A window of 1024 tokens is measured on rows of 4096, which a survey can read of any donor; half the layers of a donor
# that reads 8192 then leave 56 % of its cache, and of one that reads 32768, 52 %.
DEFAULT_WINDOW, CONTEXT_PART = 1024, 8
ROUNDING = 1e-9  # of a layer
Windows = list[int | None]  # of each layer; None: it sees the whole text


@dataclass(frozen=True)
class WindowPlan:
    """How many layers a conversion may keep full.

    Attributes:
        context: tokens at which the budget is counted.
        window: of a layer that becomes windowed.
        own: the donor's windows, which are kept.
        full: how many of the layers without a window stay so.
        fixed: which these are, if the user said so.
        keeps_first: whether a layer that becomes windowed caches the first tokens beside its window.
    """

    context: int
    window: int
    own: tuple[int | None, ...]
    full: int
    fixed: tuple[int, ...] | None = None
    keeps_first: bool = False

    @property
    def free(self) -> list[int]:
        """The layers that may become windowed."""
        return [index for index, window in enumerate(self.own) if window is None]

    @property
    def divisible(self) -> bool:
        """Whether there is a choice of layers."""
        return self.fixed is None and 0 < self.full < len(self.free)

    @property
    def least_share(self) -> float:
        """The share of the donor's cache when every layer is windowed."""
        return self.share(self.windows(()))

    def windows(self, full: Sequence[int]) -> Windows:
        """Those of all layers when `full` keep the whole text."""
        return [own or (None if index in full else self.window) for index, own in enumerate(self.own)]

    def spread(self) -> list[int]:
        """The full layers before a survey: at equal distances, the last layer first."""
        if self.fixed is not None:
            return list(self.fixed)
        free = self.free
        return [
            index
            for number, index in enumerate(free)
            if (number + 1) * self.full // len(free) > number * self.full // len(free)
        ]

    def held(self, windows: Sequence[int | None], length: int | None = None) -> list[int]:
        """Tokens of a text of `length` that each layer caches; None: of the context."""
        length = length or self.context
        return [
            held_tokens(window, length)
            if self.keeps_first and window and not own
            else min(length, window or length)
            for window, own in zip(windows, self.own, strict=True)
        ]

    def donor_tokens(self, length: int | None = None) -> int:
        """Tokens of a text of `length` that all layers of the donor hold together; None: of the context."""
        return sum(self.held(self.own, length))

    def share(self, windows: Sequence[int | None], length: int | None = None) -> float:
        """Of the donor's cache when both read `length` tokens; None: as many as the context."""
        return sum(self.held(windows, length)) / self.donor_tokens(length)

    def facts(self, windows: Sequence[int | None], share: Callable[[int], float]) -> dict[str, Any]:
        """{context, window, full_layers: how many, shares: length -> share of the donor's cache}.

        share: of a text of that many tokens.
        """
        lengths = [self.window]
        while lengths[-1] < self.context:
            lengths.append(min(2 * lengths[-1], self.context))
        return {
            "context": self.context,
            "window": self.window,
            "full_layers": list(windows).count(None),
            "shares": {str(length): share(length) for length in lengths},
        }


def held_tokens(window: int | None, length: int) -> int:
    """Tokens of a text of `length` that a layer with the first tokens caches: these are beside the window's."""
    return length if window is None else FIRST + min(length, window - 1)


def every_layer_windowed(
    config: Any, window: int | None, context: int | None, keeps_first: bool = False
) -> WindowPlan:
    """The plan that leaves least, whatever the budget. Raises BudgetError for a window that drops nothing.

    window, context: what the user asked for; None: the defaults.
    """
    own = own_windows(config)
    context = context or counted_context(config)
    reads = getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
    if context > reads:
        raise BudgetError(f"context={context} is more than the {reads} tokens that the donor reads")
    if all(own):
        raise BudgetError(
            f"every layer has a window of its own, of {own[0]} tokens: there is nothing to window"
        )
    window = _window(window, own, context, one_width=not keeps_first)
    if keeps_first:
        _require_fewer(window, context)
    elif window >= context and window in own:
        raise BudgetError(
            f"context={context} is not longer than the window of {window} that layer {own.index(window)} of the donor "
            f"has, and a class has one width for all; choose --context > {window}"
        )
    require_shorter(window, context)
    return WindowPlan(context, window, tuple(own), 0, keeps_first=keeps_first)


def _require_fewer(window: int, context: int) -> None:
    """Raise BudgetError where a layer would cache no fewer tokens, the first ones included, than the context has."""
    if (held := held_tokens(window, context)) >= context:
        most = context - FIRST
        narrower = f"--window < {most + 1}, or " if most >= LEAST_WINDOW else ""
        raise BudgetError(
            f"window={window}: a layer caches {held} tokens, the first {FIRST} included, and context={context} is not "
            f"more: it would save nothing; choose {narrower}--context > {FIRST + window - 1}"
        )


def asked_window(config: Any, settings: Any) -> int | None:
    """The width that the user asks for, in tokens, or that the windows of the user's plan have; None: the default."""
    if settings.window or not settings.plan:
        return settings.window
    pairs = zip(settings.plan, own_windows(config), strict=False)
    return next((layer["window"] for layer, own in pairs if layer["window"] and not own), None)


def window_plan(config: Any, settings: SWASettings, keeps_first: bool = False) -> WindowPlan:
    """The plan of `settings` for a donor. Raises BudgetError for settings that no plan fulfils."""
    most = every_layer_windowed(config, asked_window(config, settings), settings.context, keeps_first)
    context, window = most.context, most.window
    if settings.full_layers is not None:
        return with_full_layers(most, settings.full_layers)
    if settings.plan is not None:
        return with_planned_windows(most, [layer["window"] for layer in settings.plan])
    donor, least = most.donor_tokens(), sum(most.held(most.windows(())))
    left = settings.kv_budget * donor - least
    full = int(left / (donor - least) * len(most.free) + ROUNDING)
    if left < -ROUNDING * donor:
        narrower = "" if any(most.own) else ", a narrower window"
        raise BudgetError(
            f"kv_budget={settings.kv_budget} cannot be reached: with window={window} in every layer "
            f"{least / donor:.4g} of the donor's cache of {context} tokens is left; choose a budget of at least "
            f"{-(-10000 * least // donor) / 10000:g}{narrower}, or a longer context"
        )
    return replace(most, full=min(full, len(most.free)))


def _window(asked: int | None, own: Windows, context: int, one_width: bool) -> int:
    """The window of a layer that becomes windowed. one_width: whether it has to be that of the donor's own windows."""
    known = {window for window in own if window}
    if not known:
        return asked or max(LEAST_WINDOW, min(DEFAULT_WINDOW, context // CONTEXT_PART))
    [width] = known
    if one_width and asked not in (None, width):
        raise BudgetError(
            f"window={asked}: layer {own.index(width)} has a window of {width} already, which is kept, and "
            f"a class has one width for all; leave out --window, or choose {width}"
        )
    return asked or width


def with_full_layers(plan: WindowPlan, layers: Sequence[int]) -> WindowPlan:
    """`plan` with the full layers that the user names. Raises BudgetError for those that cannot be."""
    for index in layers:
        if not 0 <= index < len(plan.own):
            raise BudgetError(f"full_layers has {index}, and the donor's layers are 0 to {len(plan.own) - 1}")
        if plan.own[index]:
            raise BudgetError(
                f"full_layers has {index}, which has a window of {plan.own[index]} in the donor; windows are kept"
            )
    return replace(plan, full=len(layers), fixed=tuple(layers))


def with_planned_windows(plan: WindowPlan, windows: Windows) -> WindowPlan:
    """`plan` with the windows of every layer that the user plans. Raises BudgetError for those that cannot be.

    plan: of the width that the planned windows have.
    """
    if len(windows) != len(plan.own):
        raise BudgetError(f"the plan has {len(windows)} layers and the donor {len(plan.own)}")
    for index, (window, own) in enumerate(zip(windows, plan.own, strict=True)):
        wanted = own or plan.window
        if window not in (None, wanted):
            reason = (
                "the donor's own, which is kept" if own else "that of the other windows, which have one width"
            )
            raise BudgetError(f"plan, layer {index}: its window is {window}, and not {wanted}, {reason}")
    return with_full_layers(plan, [index for index in plan.free if windows[index] is None])
