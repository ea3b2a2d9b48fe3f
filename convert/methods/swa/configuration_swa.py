"""What a model with windows and first tokens is: its donor's configuration plus the window of each layer.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class WindowFields:
    """The field that windows with first tokens add to a donor's configuration.

    kv_windows: per layer, how many tokens, itself included, a query sees beside the first ones; None: what the donor's
        sees.
    """

    kv_windows: list[int | None] | None = None

    def validate_windows(self) -> None:
        """Raises ValueError for windows that do not fit the model."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.kv_windows is not None and len(self.kv_windows) != layers:
            raise ValueError(f"kv_windows has {len(self.kv_windows)} layers and the model {layers}")


def __getattr__(name: str) -> Any:
    """`SWA<Donor>Config`: transformers' <Donor>Config with `WindowFields`, made when it is asked for."""
    donor = getattr(transformers, name.removeprefix("SWA"), None)
    if not (name.startswith("SWA") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {"__module__": __name__, "model_type": f"swa_{donor.model_type}"}
    return globals().setdefault(name, strict(type(name, (WindowFields, donor), body)))
