"""The folds of one layer, against DeepSeek's own attention: an identity each, and what they cost in bfloat16."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from mhconvert.convert.export.mla.deepseek_layer import (
    EPS,
    LatentShape,
    dense_attention,
    fold,
    latent_scale,
    series_order,
    series_theta,
)

SHAPE = LatentShape(3, 24, 16, 8, 16, 32)


@given(st.floats(0.0, 1e6), st.floats(0.01, 60.0))
def test_the_norm_is_an_identity_for_latents_beyond_those_seen(mean_square: float, larger: float) -> None:
    """Up to 64 times the root mean square of the largest that was seen; the weight as float32 stores it."""
    scale = latent_scale(mean_square)
    assert math.log2(scale).is_integer()
    norm = DeepseekV3RMSNorm(256)
    norm.weight.data.fill_(math.sqrt(EPS) / scale)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(-1, keepdim=True).sqrt() * math.sqrt(max(mean_square, 1.0)) * larger
    with torch.no_grad():
        assert ((norm(x * scale) - x).norm() / x.norm()).item() < 3e-7


@given(st.floats(0.0, 1e6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_the_stored_weight_lacks_is_in_the_correction(mean_square: float, dtype: torch.dtype) -> None:
    factors = fold(mean_square, 0.25, SHAPE, 1e-5, dtype)
    assert torch.tensor(factors.norm, dtype=dtype).item() == factors.norm
    assert factors.norm * factors.latent / math.sqrt(EPS) == pytest.approx(factors.correction, rel=1e-12)
    assert factors.correction == pytest.approx(1, abs=2**-8)
    assert factors.scores == pytest.approx(0.25 * math.sqrt(24))
    assert factors.residual == pytest.approx(math.sqrt(0.1))


def random_layer(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, rank = SHAPE.num_heads, SHAPE.kv_lora_rank
    return {
        "q_proj.weight": matrix(heads * 24, 40),
        "kv_a_proj_with_mqa.weight": matrix(rank + 8, 40),
        "kv_b_proj.weight": matrix(heads * 32, rank),
        "o_proj.weight": matrix(40, heads * 16),
    }


def attention(
    tensors: dict[str, torch.Tensor], x: torch.Tensor, scale: float, value: int, order: list[int], norm: bool
) -> torch.Tensor:
    """Causal latent attention written out, each rotary component turned by its frequency; x (T, D)."""
    heads, rank, nope, length = SHAPE.num_heads, SHAPE.kv_lora_rank, SHAPE.qk_nope_head_dim, len(x)
    frequencies = torch.tensor([10.0 ** -order[i] for i in range(4)], dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(part: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(
            torch.view_as_complex(part.unflatten(-1, (4, 2)).contiguous()) * turn
        ).flatten(-2)

    query = (x @ tensors["q_proj.weight"].T).view(length, heads, -1).transpose(0, 1)
    latent, key = (x @ tensors["kv_a_proj_with_mqa.weight"].T).split([rank, 8], -1)
    if norm:
        latent = latent * (latent.square().mean(-1, keepdim=True) + EPS).rsqrt()
        latent = latent * tensors["kv_a_layernorm.weight"]
    expanded = (latent @ tensors["kv_b_proj.weight"].T).view(length, heads, -1).transpose(0, 1)
    scores = query[..., :nope] @ expanded[..., :nope].mT + turned(query[..., nope:]) @ turned(key).mT
    scores = (scores * scale).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    found = scores.softmax(-1) @ expanded[..., nope:]
    assert found.shape[-1] == value
    return found.transpose(0, 1).flatten(1) @ tensors["o_proj.weight"].T


@pytest.mark.parametrize("seed", range(3))
def test_a_folded_layer_computes_the_same_times_the_residual_factor(seed: int) -> None:
    """Norm, softmax scale, padded values and another order of rotary components, all at once."""
    layer, order = random_layer(seed), [2, 0, 3, 1]
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = attention(layer, x, 0.3, 16, [order.index(i) for i in range(4)], norm=False)
    factors = fold(100.0, 0.3, SHAPE, 1e-5, torch.bfloat16)
    theirs = attention(
        dense_attention(layer, SHAPE, factors, order), x, 24**-0.5, 32, [0, 1, 2, 3], norm=True
    )
    assert ((theirs / factors.residual - ours).norm() / ours.norm()).item() < 1e-6


@given(st.integers(2, 16), st.integers(1, 8), st.randoms())
def test_a_series_is_found_in_any_order_and_nothing_else_is(count: int, step: int, chance: Random) -> None:
    frequencies = [step * index for index in range(count)]
    chance.shuffle(frequencies)
    found = series_order(frequencies)
    assert found is not None
    assert found[0] == step
    assert [frequencies[component] for component in found[1]] == sorted(frequencies)
    missing = [frequency for frequency in frequencies if frequency]
    assert series_order([*missing, max(missing) + 1]) is None
    assert series_order([0] * count) is None
    assert series_order([]) is None


@given(st.sampled_from([64, 128, 192]), st.sampled_from([1, 2]), st.floats(1e3, 1e6))
def test_the_series_has_the_donors_frequencies(head_dim: int, step: int, theta: float) -> None:
    donor = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    own = series_theta(theta, step, 32, head_dim) ** (-2 * np.arange(16) / 32)
    assert own == pytest.approx(donor[: 16 * step : step])
