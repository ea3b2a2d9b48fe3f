"""Tiny dense DeepSeek-V3 checkpoints as the export writes them, and what llama.cpp's graph makes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.donors import make_tokenizer

EPS = 1e-6


def make_dense(
    path: Path, *, scale: float | None = 2.0**-29, seed: int = 0, dtype: Any = torch.float32, **settings: Any
) -> Path:
    """Write a random dense DeepSeek-V3 at `path`. scale: of the latent's rows, undone by the norm's weight, which makes
    the norm an identity; None: a real norm."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    latent = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
    experts = {
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    defaults = sizes | latent | experts | {"v_head_dim": 64, "vocab_size": 320, "num_key_value_heads": 4}
    defaults |= {"max_position_embeddings": 512, "rms_norm_eps": EPS, "rope_interleave": True}
    defaults |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False}
    settings = {"first_k_dense_replace": settings.get("num_hidden_layers", 3)} | defaults | settings
    config = DeepseekV3Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = DeepseekV3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.15 * noise if weight.dim() > 1 else weight + 0.1 * noise)
        for layer in model.model.layers if scale else ():
            layer.self_attn.kv_a_proj_with_mqa.weight[: config.kv_lora_rank] *= scale
            layer.self_attn.kv_a_layernorm.weight.fill_(EPS**0.5 / scale)
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def stored(file: Path) -> dict[str, Tensor]:
    """The file's tensors in float32, rows first."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(shape).float()
    return found


def fact(file: Path, key: str) -> Any:
    """A metadata value of the file's architecture, or with a dot in front, any."""
    name = key[1:] if key.startswith(".") else f"deepseek2.{key}"
    return gguf.GGUFReader(file).fields[name].contents()


def logits(file: Path, ids: list[int], *, half: bool = False) -> np.ndarray:
    """What llama.cpp's graph computes, T V, in float64. half: kv_a_proj_with_mqa is multiplied in half precision, as
    by its Metal backend."""
    tensors = {name: value.double() for name, value in stored(file).items()}
    heads, rope, rank = (
        fact(file, k) for k in ("attention.head_count", "rope.dimension_count", "attention.kv_lora_rank")
    )
    width, theta = fact(file, "attention.key_length_mla"), fact(file, "rope.freq_base")
    eps = fact(file, "attention.layer_norm_rms_epsilon")
    angles = torch.arange(len(ids)).double()[:, None] * theta ** (-torch.arange(0, rope, 2).double() / rope)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * tensors[name]

    def turn(x: Tensor) -> Tensor:  # pairs side by side, T … p
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(
            1j * by_rows(x, angles)
        )
        return torch.view_as_real(turned).flatten(-2)

    hidden = tensors["token_embd.weight"][ids]
    for index in range(fact(file, "block_count")):
        own = {n.split(".", 2)[2]: v for n, v in tensors.items() if n.startswith(f"blk.{index}.")}
        x = norm(hidden, f"blk.{index}.attn_norm.weight")
        query = (x @ own["attn_q.weight"].T).unflatten(-1, (heads, width))
        reads, inputs = own["attn_kv_a_mqa.weight"], x
        if half:
            reads, inputs = reads.half().double(), x.half().double()
        read = inputs @ reads.T
        latent = norm(read[:, :rank], f"blk.{index}.attn_kv_a_norm.weight")
        key = torch.cat((latent, turn(read[:, rank:])), -1)
        absorbed = torch.einsum("thn,hrn->thr", query[..., : width - rope], own["attn_k_b.weight"])
        query = torch.cat((absorbed, turn(query[..., width - rope :])), -1)
        scores = torch.einsum("thr,sr->hts", query, key) * width**-0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
        values = torch.einsum("hts,sr,hvr->thv", scores, latent, own["attn_v_b.weight"])
        hidden = hidden + values.flatten(1) @ own["attn_output.weight"].T
        x = norm(hidden, f"blk.{index}.ffn_norm.weight")
        gated = torch.nn.functional.silu(x @ own["ffn_gate.weight"].T) * (x @ own["ffn_up.weight"].T)
        hidden = hidden + gated @ own["ffn_down.weight"].T
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return (norm(hidden, "output_norm.weight") @ head.T).numpy()


def by_rows(x: Tensor, angles: Tensor) -> Tensor:
    """angles (T, p / 2), made to fit x (T, …, p)."""
    return angles.view(len(angles), *(1,) * (x.dim() - 2), -1)
