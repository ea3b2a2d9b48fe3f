"""What a model with coded latents is: its donor's configuration plus how many components have how many bits.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class CodedLatentFields:
    """The fields that coded latents add to a donor's configuration.

    kv_code_counts: per layer, how many components of the latent have 8, 7, …, 1 bits.
    kv_windows: per layer, how many tokens, itself included, a query sees beside the first ones, and the cache holds;
        None: what the donor's sees. The field itself is None where no layer has such a window.
    attention_input_bias, attention_output_bias: whether q_proj and whether o_proj have biases.
    qk_norm: "head" where the donor divides each head of its queries and keys by its RMS, "width" where it divides
        them whole.
    softmax_scale: what scores are multiplied by; None: head_dim ** -0.5.
    attention_softcap: c where scores pass through c · tanh(score / c).
    """

    kv_code_counts: list[list[int]] | None = None
    kv_windows: list[int | None] | None = None
    attention_input_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str | None = None
    softmax_scale: float | None = None
    attention_softcap: float | None = None

    def layer_counts(self, layer_idx: int) -> list[int]:
        """Components of one layer's latent that have 8, 7, …, 1 bits."""
        if self.kv_code_counts is None:
            raise ValueError("config.json lacks kv_code_counts")
        return self.kv_code_counts[layer_idx]

    def kv_window(self, layer_idx: int) -> int | None:
        """The window that a conversion gave one layer; None: none."""
        return None if self.kv_windows is None else self.kv_windows[layer_idx]

    def layer_window(self, layer_idx: int) -> int | None:
        """How many tokens, itself included, a query of one layer sees; None: all before it."""
        kinds = getattr(self, "layer_types", None)
        if kinds is not None and kinds[layer_idx] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None) or None


def __getattr__(name: str) -> Any:
    """`CodedMLA<Donor>Config`: transformers' <Donor>Config with `CodedLatentFields`, made when it is asked for."""
    donor = getattr(transformers, name.removeprefix("CodedMLA"), None)
    if not (name.startswith("CodedMLA") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plan = donor.base_model_tp_plan or {}
    body = {
        "__module__": __name__,
        "model_type": f"mla_coded_{donor.model_type}",
        # The attention stays whole on every device: all heads read the same rows.
        "base_model_tp_plan": {key: style for key, style in plan.items() if ".self_attn." not in key},
    }
    return globals().setdefault(name, strict(type(name, (CodedLatentFields, donor), body)))
