"""The architectures of GGUF files: names of tensors and conventions of the stored values."""

from __future__ import annotations

from dataclasses import dataclass, field

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """The storage conventions of one architecture.

    Attributes:
        interleaved: whether the rows of q and k are in llama.cpp's interleaved RoPE order.
        norm_offset: the stored weight of a norm minus transformers'.
        names: name of a module in llama.cpp -> in transformers.
    """

    interleaved: bool
    norm_offset: float = 0.0
    names: dict[str, str] = field(default_factory=lambda: NAMES)

    def hub_name(self, name: str) -> str:
        """The name in transformers of the tensor `name`; an unknown one is kept, and rejected by `TensorLayout`."""
        part, _, suffix = name.rpartition(".")
        if part.startswith("blk."):
            _, layer, part = part.split(".", 2)
            return f"model.layers.{layer}.{self.names.get(part, part)}.{suffix}"
        return f"{self.names.get(part, part)}.{suffix}"


ARCHITECTURES = {
    "llama": Architecture(interleaved=True),
    "gemma3": Architecture(interleaved=False, norm_offset=1.0, names=NAMES | GEMMA3_NAMES),
}
