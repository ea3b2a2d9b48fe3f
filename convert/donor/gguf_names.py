"""llama.cpp's architectures as data: the names of their tensors, and how the values are stored."""

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
    """How GGUF files store the models of one architecture.

    Attributes:
        interleaved: whether the rows of q and k are in llama.cpp's interleaved RoPE order.
        norm_offset: the stored gain of a norm minus transformers' weight.
        names: llama.cpp's name of a module -> transformers'.
    """

    interleaved: bool
    norm_offset: float = 0.0
    names: dict[str, str] = field(default_factory=lambda: NAMES)

    def hub_name(self, name: str) -> str:
        """transformers' name of llama.cpp's tensor `name`; an unknown one stays, and the donor's check refuses it."""
        part, _, suffix = name.rpartition(".")
        if part.startswith("blk."):
            _, layer, part = part.split(".", 2)
            return f"model.layers.{layer}.{self.names.get(part, part)}.{suffix}"
        return f"{self.names.get(part, part)}.{suffix}"


ARCHITECTURES = {
    "llama": Architecture(interleaved=True),
    "gemma3": Architecture(interleaved=False, norm_offset=1.0, names=NAMES | GEMMA3_NAMES),
}
