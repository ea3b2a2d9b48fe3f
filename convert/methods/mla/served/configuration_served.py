"""What a model with served latent attention is: its donor's configuration plus the sizes of the latent cache.

`head_dim`, by which vLLM sizes a latent cache, is that of a cached row, kv_lora_rank + qk_rope_head_dim.

This file is shipped inside exported checkpoints: it imports torch, transformers and its siblings only.
"""

import copy
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@dataclass(kw_only=True, repr=False)
class ServedLatentFields:
    """The fields that served latent attention adds to a donor's configuration; names are DeepSeek's where it has them.

    kv_lora_rank, qk_rope_head_dim: widths of the cached latent and rotary key, the same in all layers.
    qk_nope_head_dim, v_head_dim: per-head widths of the expanded non-rotary key and of the value; the first is the
        donor's head_dim, over which its rotary frequencies are spread.
    rope_frequencies: per layer, which of the donor's rotary frequencies each pair of the rotary key turns with.
    latent_norm_eps: of the latent's norm; large where that norm is there for its form alone.
    attention_input_bias, attention_output_bias: whether q_proj and kv_a_proj_with_mqa, and o_proj, have biases.
    softmax_scale: what scores are multiplied by.
    """

    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_frequencies: list[list[int]] | None = None
    latent_norm_eps: float | None = None
    attention_input_bias: bool = False
    attention_output_bias: bool = False
    softmax_scale: float | None = None
    num_key_scales = 0  # of the cache: latent and rotary key are all that it holds

    @property
    def qk_head_dim(self) -> int | None:
        """Width of a head's query. transformers lets a cache take its widths from what it is given where this is."""
        if self.qk_nope_head_dim is None or self.qk_rope_head_dim is None:
            return None
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def rotary_config(self) -> Any:
        """This configuration as the donor's rotary embedding reads it: with its head_dim."""
        donors: Any = copy.deepcopy(self)
        donors.head_dim = self.qk_nope_head_dim
        return donors

    def latent_rank(self, layer_idx: int) -> int | None:
        """Width of the cached latent of one layer."""
        return self.kv_lora_rank

    def layer_frequencies(self, layer_idx: int) -> list[int]:
        """Indices into the donor's rotary frequencies, one for each pair of one layer's rotary key."""
        if self.rope_frequencies is None:
            raise ValueError("config.json lacks rope_frequencies")
        return self.rope_frequencies[layer_idx]


# kv_a_proj_with_mqa stays whole on every device, as what it makes, the cache, serves all heads.
LATENT_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


def latent_tp_plan(donor_plan: dict[str, str] | None) -> dict[str, str]:
    """The donor's tensor-parallel plan with its attention projections replaced by ours."""
    return LATENT_TP_PLAN | {k: v for k, v in (donor_plan or {}).items() if ".self_attn." not in k}


def __getattr__(name: str) -> Any:
    """`MLAServed<Donor>Config`: transformers' <Donor>Config with `ServedLatentFields`, made when it is asked for.

    So a checkpoint needs of transformers only the one family that it names.
    """
    donor = getattr(transformers, name.removeprefix("MLAServed"), None)
    if not (name.startswith("MLAServed") and name.endswith("Config") and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    body = {
        "__module__": __name__,
        "model_type": f"mla_served_{donor.model_type}",
        "base_model_tp_plan": latent_tp_plan(donor.base_model_tp_plan),
    }
    return globals().setdefault(name, strict(type(name, (ServedLatentFields, donor), body)))
