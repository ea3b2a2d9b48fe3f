"""What a model with decoupled heads is: its donor's configuration plus which heads each layer has.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class DecoupledHeadFields:
    """The fields that decoupled heads add to a donor's configuration.

    k_head_map, v_head_map: per layer, which of its K heads and which of its V heads each query head reads; a layer has
    as many heads as its map names, numbered from 0. num_key_value_heads stays the donor's and counts nothing here.
    k_fusion, v_fusion: per layer, the head that each K head, and each V head, is to become part of; None: nothing is
    left to fuse.
    attention_output_bias: whether o_proj has a bias (what fused values lack of the donor's means).
    attention_input_bias: whether the projections that read the hidden state have biases.
    softmax_scale: what scores are multiplied by; None: head_dim ** -0.5.
    attention_softcap: c where scores pass through c · tanh(score / c).
    qk_norm: "head" where the donor divides each head of its queries and keys by its RMS, "width" where it divides all
    heads by one; then every layer has all K heads of the donor.
    """

    k_head_map: list[list[int]] | None = None
    v_head_map: list[list[int]] | None = None
    k_fusion: list[list[int]] | None = None
    v_fusion: list[list[int]] | None = None
    attention_output_bias: bool = False
    attention_input_bias: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: str | None = None

    def validate_head_maps(self) -> None:
        """Raises ValueError for a map that does not fit the model."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        heads: int = self.num_attention_heads  # type: ignore[attr-defined]
        for field in ("k_head_map", "v_head_map"):
            maps = getattr(self, field)
            if maps is None:
                continue
            if len(maps) != layers:
                raise ValueError(f"{field} has {len(maps)} layers and the model {layers}")
            for index, found in enumerate(maps):
                if len(found) != heads:
                    raise ValueError(f"{field}, layer {index}: {len(found)} entries for {heads} query heads")
                if sorted(set(found)) != list(range(len(set(found)))):
                    raise ValueError(
                        f"{field}, layer {index}: {found} does not number its heads 0, 1, … without a gap"
                    )

    def head_maps(self, layer_idx: int) -> tuple[list[int], list[int]]:
        """(K head, V head) that each query head of one layer reads."""
        if self.k_head_map is None or self.v_head_map is None:
            raise ValueError("config.json lacks k_head_map or v_head_map")
        return self.k_head_map[layer_idx], self.v_head_map[layer_idx]

    def layer_window(self, layer_idx: int) -> int | None:
        """How many tokens, itself included, a query of one layer sees; None: all before it."""
        kinds = getattr(self, "layer_types", None)
        if kinds is not None and kinds[layer_idx] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None) or None


def __getattr__(name: str) -> Any:
    """`DHA<Donor>Config`: transformers' <Donor>Config with `DecoupledHeadFields`, made when it is asked for.

    So a checkpoint needs of transformers only the one family that it names.
    """
    donor = getattr(transformers, name.removeprefix("DHA"), None)
    if not (name.startswith("DHA") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    plan = donor.base_model_tp_plan or {}
    body = {
        "__module__": __name__,
        "model_type": f"dha_{donor.model_type}",
        # Heads of different numbers do not divide alike: attention stays whole on every device.
        "base_model_tp_plan": {name: style for name, style in plan.items() if ".self_attn." not in name},
    }
    return globals().setdefault(name, strict(type(name, (DecoupledHeadFields, donor), body)))
