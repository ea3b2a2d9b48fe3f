"""What a model with latent attention is: its donor's configuration plus the sizes of the latent cache.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class LatentAttentionFields:
    """The fields that latent attention adds to a donor's configuration.

    kv_lora_rank: width of the cached latent, one for all layers or one a layer.
    rope_frequencies: per layer, which of the donor's head_dim / 2 rotary frequencies each shared rotary
    component turns with; a frequency may occur several times. A layer's rotary key has twice as many elements.
    qk_nope_head_dim: per-head width of the expanded non-rotary key, one for all layers or one a layer.
    v_head_dim: per-head width of the value, the donor's head_dim.
    rope_in_latent: whether kv_b_proj reads the rotary key beside the latent; it is then cached before its rotation.
    attention_output_bias: whether o_proj has a bias (the share of the values that does not depend on the token).
    attention_input_bias: whether the projections that read the hidden state have biases.
    softmax_scale: what scores are multiplied by; None: head_dim ** -0.5.
    attention_softcap: c where scores pass through c · tanh(score / c).
    qk_norm: "head" where the donor divides each head of its queries and keys by its RMS, "width" where it divides
    all heads by one; then a layer's cache also holds 1 / RMS of the key, for each KV head or once.
    """

    kv_lora_rank: int | list[int] | None = None
    rope_frequencies: list[list[int]] | None = None
    qk_nope_head_dim: int | list[int] | None = None
    v_head_dim: int | None = None
    rope_in_latent: bool = False
    attention_output_bias: bool = False
    attention_input_bias: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm: str | None = None

    @property
    def num_key_scales(self) -> int:
        """Scalars that a token's cache entry holds beside latent and rotary key: 1 / RMS of the donor's keys."""
        groups: int = self.num_key_value_heads  # type: ignore[attr-defined]
        return {None: 0, "head": groups, "width": 1}[self.qk_norm]

    def latent_rank(self, layer_idx: int) -> int:
        """Width of the cached latent of one layer."""
        return self.layer_width("kv_lora_rank", layer_idx)

    def nope_width(self, layer_idx: int) -> int:
        """Width of a head's non-rotary key in one layer."""
        return self.layer_width("qk_nope_head_dim", layer_idx)

    def layer_width(self, name: str, layer_idx: int) -> int:
        """One layer's size in the field `name`, which holds one for all layers or one a layer."""
        width: int | list[int] | None = getattr(self, name)
        if isinstance(width, list):
            return width[layer_idx]
        if width is None:
            raise ValueError(f"config.json lacks {name}")
        return width

    def layer_frequencies(self, layer_idx: int) -> list[int]:
        """Indices into the donor's rotary frequencies, one for each rotary component of one layer."""
        if self.rope_frequencies is None:
            raise ValueError("config.json lacks rope_frequencies")
        return self.rope_frequencies[layer_idx]

    def layer_window(self, layer_idx: int) -> int | None:
        """How many tokens, itself included, a query of one layer sees; None: all before it."""
        kinds = getattr(self, "layer_types", None)
        if kinds is not None and kinds[layer_idx] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None) or None


# kv_a_proj_with_mqa stays whole on every device, as what it makes, the cache, serves all heads.
LATENT_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


def latent_tp_plan(donor_plan: dict[str, str] | None) -> dict[str, str]:
    """The donor's tensor-parallel plan with its attention projections replaced by ours.

    A norm over queries or keys (or a plan that gathers them for it) keeps the attention whole on every device.
    """
    plan = donor_plan or {}
    whole = any("_norm" in name or "gather" in style for name, style in plan.items() if ".self_attn." in name)
    kept = {name: style for name, style in plan.items() if ".self_attn." not in name}
    return kept if whole else LATENT_TP_PLAN | kept


def __getattr__(name: str) -> Any:
    """`MLA<Donor>Config`: transformers' <Donor>Config with `LatentAttentionFields`, made when it is asked for.

    So a checkpoint needs of transformers only the one family that it names.
    """
    donor = getattr(transformers, name.removeprefix("MLA"), None)
    if not (name.startswith("MLA") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {
        "__module__": __name__,
        "model_type": f"mla_{donor.model_type}",
        "base_model_tp_plan": latent_tp_plan(donor.base_model_tp_plan),
    }
    return globals().setdefault(name, strict(type(name, (LatentAttentionFields, donor), body)))
