"""What a user may choose about a new adapter."""

from __future__ import annotations

from dataclasses import dataclass

from mhconvert.errors import AdapterError


@dataclass(frozen=True)
class HydraSettings:
    """r_par, r_seq: ranks of the branch that reads a module's input and of the one that reads its output; 0: none.

    targets: names of linear modules, or their ends (None: by model type, those that write to the residual stream);
    "all-linear" alone: all but the head.
    scale: what both branches are multiplied by. dropout: of what is between a branch's matrices, in training.
    """

    r_par: int = 8
    r_seq: int = 8
    targets: tuple[str, ...] | None = None
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise AdapterError(f"targets '{self.targets}' is not a list of module names")
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))
            if not self.targets:
                raise AdapterError("targets is empty; name a linear module, or leave it out for the default")


SETTINGS = HydraSettings
