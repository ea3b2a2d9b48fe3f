"""What a mixture-of-head model is: its donor's configuration plus which heads a token may leave out.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class MixtureOfHeadFields:
    """The fields that mixture-of-head attention adds to a donor's configuration.

    head_route: what is routed, single query "heads", or "groups" of those that read one KV head; the units below.
    shared_heads: per layer, the units that every token has. active_heads: per layer, how many units a token has, the
    shared ones included. head_router: "learned": scores are a linear map of the attention's input; "norm": they are
    norm_scale · log ‖q‖ + norm_offset of a unit's queries, these two per layer and routed unit (None: 1 and 0).
    whole_start: whether the token at position 0 has all heads where others are routed.
    softmax_scale: what scores of keys are multiplied by. attention_softcap: c where they pass through c · tanh(s / c).
    """

    head_route: Literal["heads", "groups"] = "heads"
    shared_heads: list[list[int]] | None = None
    active_heads: list[int] | None = None
    head_router: Literal["learned", "norm"] = "learned"
    norm_scale: list[list[float]] | None = None
    norm_offset: list[list[float]] | None = None
    whole_start: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None

    @property
    def routing_units(self) -> int:
        """Units of a layer: query heads, or groups of them."""
        name = "num_attention_heads" if self.head_route == "heads" else "num_key_value_heads"
        return getattr(self, name)

    def validate_routing(self) -> None:
        """Raises ValueError for a routing that does not fit the model."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        units, kind = self.routing_units, self.head_route
        for field in ("shared_heads", "active_heads", "norm_scale", "norm_offset"):
            found = getattr(self, field)
            if found is not None and len(found) != layers:
                raise ValueError(f"{field} has {len(found)} layers and the model {layers}")
        if (self.norm_scale is None) != (self.norm_offset is None):
            raise ValueError("norm_scale and norm_offset go together")
        if self.shared_heads is None or self.active_heads is None:
            return
        for index, (shared, active) in enumerate(zip(self.shared_heads, self.active_heads, strict=True)):
            if len(set(shared)) != len(shared) or not set(shared) <= set(range(units)):
                raise ValueError(
                    f"shared_heads, layer {index}: {shared} are not different ones of {units} {kind}"
                )
            if not max(1, len(shared)) <= active <= units:
                raise ValueError(
                    f"active_heads, layer {index}: {active} is not from {max(1, len(shared))} to {units}"
                )
            routed = units - len(shared)
            for field in ("norm_scale", "norm_offset"):
                found = getattr(self, field)
                if found is not None and len(found[index]) not in (0, routed):
                    raise ValueError(
                        f"{field}, layer {index}: {len(found[index])} numbers for {routed} routed {kind}"
                    )

    def layer_routing(self, layer_idx: int) -> tuple[list[int], list[int], int]:
        """Shared units, routed units, and how many of the routed ones a token has."""
        if self.shared_heads is None or self.active_heads is None:
            raise ValueError("config.json lacks shared_heads or active_heads")
        shared = self.shared_heads[layer_idx]
        routed = [unit for unit in range(self.routing_units) if unit not in shared]
        return shared, routed, self.active_heads[layer_idx] - len(shared)

    def layer_window(self, layer_idx: int) -> int | None:
        """How many tokens, itself included, a query of one layer sees; None: all before it."""
        kinds = getattr(self, "layer_types", None)
        if kinds is not None and kinds[layer_idx] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None) or None


def __getattr__(name: str) -> Any:
    """`MoH<Donor>Config`: transformers' <Donor>Config with `MixtureOfHeadFields`, made when it is asked for.

    So a checkpoint needs of transformers only the one family that it names.
    """
    donor = getattr(transformers, name.removeprefix("MoH"), None)
    if not (name.startswith("MoH") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, routed_config(name, donor, __name__))


def routed_config(name: str, donor: Any, module: str) -> Any:
    """The configuration class `name` of `module`: that of a donor with `MixtureOfHeadFields`."""
    plan = donor.base_model_tp_plan or {}
    body = {
        "__module__": module,
        "model_type": f"moh_{donor.model_type}",
        # The routed heads of a token are chosen among all of them: attention stays whole on every device.
        "base_model_tp_plan": {name: style for name, style in plan.items() if ".self_attn." not in name},
    }
    return strict(type(name, (MixtureOfHeadFields, donor), body))
