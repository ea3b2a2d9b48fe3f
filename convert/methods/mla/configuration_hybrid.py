"""What a hybrid of linear layers and coded latents is: the fields of coded latents, and which layers are linear.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

from .configuration_coded_mla import CodedLatentFields

MIXERS = ("gated-deltanet", "mamba2")


@dataclass(kw_only=True, repr=False)
class HybridFields(CodedLatentFields):
    """The fields that a hybrid adds to a donor's configuration.

    linear_layers: the layers without keys and values: a state of fixed size holds all that they know of the text.
    linear_mixer: what these layers are, of MIXERS. They have the donor's query heads, each of head_dim.
    linear_conv_kernel: tokens that their convolution reads, the own one included.
    """

    linear_layers: list[int] | None = None
    linear_mixer: str = MIXERS[0]
    linear_conv_kernel: int = 4

    def is_linear(self, layer_idx: int) -> bool:
        """Whether one layer is linear."""
        if self.linear_mixer not in MIXERS:
            raise ValueError(f"linear_mixer '{self.linear_mixer}' is none of {', '.join(MIXERS)}")
        return layer_idx in (self.linear_layers or ())


def __getattr__(name: str) -> Any:
    """`Hybrid<Donor>Config`: transformers' <Donor>Config with `HybridFields`, made when it is asked for."""
    donor = getattr(transformers, name.removeprefix("Hybrid"), None)
    if not (name.startswith("Hybrid") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plan = donor.base_model_tp_plan or {}
    body = {
        "__module__": __name__,
        "model_type": f"hybrid_{donor.model_type}",
        # Attention and states stay whole on every device.
        "base_model_tp_plan": {key: style for key, style in plan.items() if ".self_attn." not in key},
    }
    return globals().setdefault(name, strict(type(name, (HybridFields, donor), body)))
