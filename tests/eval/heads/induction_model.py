"""A model made by hand whose heads are known: it continues a text as it went on after the same token before.

Layer 0, head 0 looks at the token before and copies it; head 1 does nothing. Layer 1, head 0 looks at the token behind
an earlier occurrence and writes it down; head 1 looks at occurrences of the same token and does nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.donors import make_config, make_model

TOKENS, HEAD, HIDDEN = 24, 64, 96
TOKEN, BEFORE, CONSTANT, WRITTEN = range(24), range(24, 48), 48, range(49, 73)
SLOW = range(8, 32)  # rotary pairs that hardly turn: one for each token
FAST = 3  # pairs that tell neighbours apart
SHARP = 40.0


def induction_model() -> Any:
    """Two layers of two heads over 24 tokens."""
    config = make_config(
        heads=2,
        kv_heads=2,
        hidden=HIDDEN,
        head_dim=HEAD,
        layers=2,
        vocab=TOKENS,
        tied=False,
        rope={"rope_theta": 1e30},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = make_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, TOKEN] = torch.eye(TOKENS)
        model.model.embed_tokens.weight[:, CONSTANT] = 1
        model.lm_head.weight[:, WRITTEN] = 10 * torch.eye(TOKENS)
        first, second = (layer.self_attn for layer in model.model.layers)
        for pair in range(FAST):
            angle = torch.tensor(1e30 ** (-pair / (HEAD // 2)))
            first.k_proj.weight[pair, CONSTANT] = 1
            first.q_proj.weight[pair, CONSTANT] = SHARP / 6 * angle.cos()
            first.q_proj.weight[pair + HEAD // 2, CONSTANT] = -SHARP / 6 * angle.sin()
        one_hot = torch.eye(TOKENS)
        first.v_proj.weight[:TOKENS, TOKEN] = one_hot
        first.o_proj.weight[BEFORE, :TOKENS] = one_hot / (HIDDEN / 2) ** 0.5
        for head, read in ((0, BEFORE), (1, TOKEN)):
            rows = torch.tensor([head * HEAD + pair for pair in SLOW])
            second.q_proj.weight[rows, : len(TOKEN)] = SHARP / 4 * one_hot
            second.k_proj.weight[rows, read.start : read.stop] = one_hot
        second.v_proj.weight[:TOKENS, TOKEN] = one_hot
        second.o_proj.weight[WRITTEN, :TOKENS] = one_hot
    model.set_attn_implementation("eager")
    return model
