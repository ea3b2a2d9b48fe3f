"""What a user may choose about a new Hydra adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mhconvert.errors import AdapterError

from ...validation.option import Names, Option, Takes, default
from ...validation.settings import Settings

LARGEST_RANK = 1 << 16  # no linear layer is as wide in both directions
LARGEST_SCALE = 1e30
RANK = f"is not a rank: a whole number from 0 to {LARGEST_RANK}"


def module_names(text: str) -> tuple[str, ...]:
    """("o_proj", "down_proj") from "o_proj,down_proj". Raises AdapterError for an empty name."""
    names = tuple(word.strip() for word in text.split(","))
    if not all(names):
        raise AdapterError(f"targets '{text}' has an empty name")
    return names


@dataclass(frozen=True)
class HydraSettings(Settings):
    """The ranks of the two branches, and the modules that get them."""

    fault = AdapterError

    r_par: Annotated[
        int,
        Option(
            "Rank of the branch that reads a module's input; 0: no such branch.",
            "N",
            ge=0,
            le=LARGEST_RANK,
            range_hint=RANK,
        ),
    ] = 8
    r_seq: Annotated[
        int,
        Option(
            "Rank of the branch that reads a module's output; 0: no such branch.",
            "N",
            ge=0,
            le=LARGEST_RANK,
            range_hint=RANK,
        ),
    ] = 8
    targets: Annotated[
        Takes[tuple[str, ...] | None, Names | None],
        Option(
            "Linear modules, by the end of their names, or all-linear: all but the head.",
            "NAME,NAME,…",
            parse=module_names,
            also=str,
            default="by model type, those that write to the residual stream: o_proj,down_proj",
        ),
    ] = default(None)
    scale: Annotated[
        float,
        Option(
            "What both branches are multiplied by.",
            "S",
            ge=-LARGEST_SCALE,
            le=LARGEST_SCALE,
            range_hint="is not a finite number, or beyond 1e30",
        ),
    ] = 1.0
    dropout: Annotated[
        float,
        Option(
            "Dropout between a branch's matrices in training, where the model is then not what merging gives.",
            "P",
            ge=0,
            lt=1,
        ),
    ] = 0.0

    def check(self) -> None:
        """Raise AdapterError for an empty list of modules."""
        if self.targets is not None and not self.targets:
            raise AdapterError("targets is empty; name a linear module, or leave it out for the default")


SETTINGS = HydraSettings
