"""Attention in 16-bit products: near torch's own, and out of the way where it does not compute the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mhconvert.convert.attention import half_attention
from mhconvert.convert.attention.half_attention import causal_blocks, half_layers

CPU = torch.device("cpu")


def random_heads(length: int, heads: int = 6, groups: int = 2, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(heads, width), (groups, width), (groups, width // 2)]
    return [torch.randn(2, n, length, d, generator=generator, requires_grad=True) for n, d in sizes]


@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_blocks_are_causal_attention_with_products_of_16_bits(length: int) -> None:
    given = random_heads(length)
    scaled = [F.scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)]
    scaled.append(causal_blocks(*given, scaling=0.3).transpose(1, 2))
    gradients = [torch.autograd.grad(each.float().square().sum(), given) for each in scaled]
    for exact, rounded in zip((scaled[0], *gradients[0]), (scaled[1], *gradients[1]), strict=True):
        assert (rounded - exact).square().sum() <= 1e-4 * exact.square().sum()  # of bfloat16, 2e-5


@pytest.mark.parametrize(
    ("changed", "stock"),
    [
        ({}, False),
        ({"attention_mask": torch.zeros(1, 1, 8, 8)}, True),
        ({"dropout": 0.1}, True),
        ({"is_causal": False}, True),
        ({"s_aux": torch.zeros(6)}, True),
    ],
)
def test_what_blocks_do_not_compute_is_left_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], stock: bool
) -> None:
    asked = []
    monkeypatch.setattr(half_attention, "sdpa_attention_forward", lambda *_, **named: asked.append(named))
    options = {"attention_mask": None, "dropout": 0.0, "scaling": 0.25, "sliding_window": 4} | changed
    monkeypatch.setattr(half_attention, "half_products", lambda _: torch.autocast("cpu", torch.bfloat16))
    with half_layers(CPU):
        ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Identity(), *random_heads(8), **options)
    assert bool(asked) is stock


def test_the_kernel_is_back_behind_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_attention, "half_products", lambda _: torch.autocast("cpu", torch.bfloat16))
    with half_layers(CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is half_attention._half_attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
