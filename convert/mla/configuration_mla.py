"""What a model with latent attention is: its donor's configuration plus the sizes of the latent cache.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.
"""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig


@dataclass(kw_only=True, repr=False)
class LatentAttentionFields:
    """The fields that latent attention adds to a donor's configuration.

    kv_lora_rank: width of the cached latent, one for all layers or one a layer.
    rope_frequencies: per layer, which of the donor's head_dim / 2 rotary frequencies each shared rotary
    component turns with; a frequency may occur several times. A layer's rotary key has twice as many elements.
    qk_nope_head_dim, v_head_dim: per-head widths of the expanded non-rotary key and of the value.
    attention_output_bias: whether o_proj has a bias (the share of the values that does not depend on the token).
    """

    kv_lora_rank: int | list[int] | None = None
    rope_frequencies: list[list[int]] | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    attention_output_bias: bool = False

    def latent_rank(self, layer_idx: int) -> int:
        """Width of the cached latent of one layer."""
        rank = self.kv_lora_rank
        if isinstance(rank, list):
            return rank[layer_idx]
        if rank is None:
            raise ValueError("config.json lacks kv_lora_rank")
        return rank

    def layer_frequencies(self, layer_idx: int) -> list[int]:
        """Indices into the donor's rotary frequencies, one for each rotary component of one layer."""
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
    kept = {name: style for name, style in (donor_plan or {}).items() if ".self_attn." not in name}
    return LATENT_TP_PLAN | kept


@strict
class MLALlamaConfig(LatentAttentionFields, LlamaConfig):
    model_type = "mla_llama"
    base_model_tp_plan = latent_tp_plan(LlamaConfig.base_model_tp_plan)


@strict
class MLAMistralConfig(LatentAttentionFields, MistralConfig):
    model_type = "mla_mistral"
    base_model_tp_plan = latent_tp_plan(MistralConfig.base_model_tp_plan)
