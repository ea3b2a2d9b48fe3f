"""An attention as the start of a mixer: where its maps go, what a neutral mixer is, and the families."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhconvert.convert.attention.linalg import relative_error
from mhconvert.convert.attention.rotary import layer_rotary
from mhconvert.convert.layer_pass.decoder_layer import Layer
from mhconvert.convert.methods.hybrid_mla.layer import UNSEEN as JUDGING
from mhconvert.convert.methods.hybrid_mla.layer import mixer_layer
from mhconvert.convert.methods.hybrid_mla.method import HybridMLA
from mhconvert.convert.methods.hybrid_mla.settings import HybridSettings, Mixer
from mhconvert.convert.methods.hybrid_mla.surgery import (
    constant_reader,
    head_maps,
    inverse_softplus,
    output_map,
)
from mhconvert.heal.layer_fit import UNSEEN
from tests.convert.conversions import attention_inputs, donor_model, token_ids

from .hybrids import MIXERS

HEADS, GROUPS, WIDTH = 4, 2, 8
GATE = 1.2785


def started(mixer: Mixer, **config: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """A donor's attention, the linear one that starts from it, and what the former reads and returns."""
    donor = donor_model(**({"layers": 3, "hidden": 32, "std": 0.3} | config))
    method = HybridMLA(donor.config, HybridSettings(0.9, linear_layers=[1], mixer=mixer), "quick")
    inputs = attention_inputs(donor, token_ids(6, 48))[1]
    module = donor.model.layers[1]
    rotary = layer_rotary(donor.model.rotary_emb, donor.config, 1, 48)
    targets = Layer(module, None, rotary, 1).attend(module.self_attn, inputs)
    seen = method.observe(module.self_attn, inputs, rotary)
    return module.self_attn, mixer_layer(method.config, seen, inputs, targets), inputs, targets


def by_heads(projection: Any, heads: int) -> Tensor:
    """(H, d, D) of a donor's projection."""
    return projection.weight.unflatten(0, (heads, -1)).repeat_interleave(HEADS // heads, dim=0)


def test_the_maps_are_at_their_places() -> None:
    for mixer in MIXERS:
        donor, linear, inputs, _ = started(mixer)
        q, k, v = (
            by_heads(p, n) for p, n in ((donor.q_proj, HEADS), (donor.k_proj, GROUPS), (donor.v_proj, GROUPS))
        )
        inner = HEADS * WIDTH
        if mixer == "mamba2":
            z, x, b, c, _ = linear.mixer.in_proj.weight.split([inner, inner, inner, inner, HEADS])
            found = [part.unflatten(0, (HEADS, WIDTH)) for part in (c, b, x, z)]
        else:
            projected = linear.mixer.in_proj_qkvz(torch.eye(32)[None])
            of_gates = linear.mixer.in_proj_ba(torch.eye(32)[None])
            parts = linear.mixer.fix_query_key_value_ordering(projected, of_gates)[:4]
            found = [part[0].permute(1, 2, 0) for part in parts]
        for expected, one in zip((q, k, v), found, strict=False):
            assert torch.allclose(one, expected, atol=1e-6)
        of_gate = GATE * constant_reader(inputs[:-1]).float()  # whose SiLU is 1
        assert torch.allclose(found[3], of_gate.expand(HEADS, WIDTH, -1), atol=1e-6)
        assert not linear.mixer.conv1d.weight[..., :-1].any()
        assert (linear.mixer.conv1d.weight[..., -1] > 0).all()


def test_the_start_does_not_know_the_rows_that_judge_its_fit() -> None:
    """Else it is nearer on them than any fit of few rows, which is then thrown away."""
    assert JUDGING == UNSEEN
    donor = donor_model(layers=3, hidden=32, std=0.3)
    method = HybridMLA(donor.config, HybridSettings(0.9, linear_layers=[1]), "quick")
    inputs, attention = torch.randn(6, 48, 32), donor.model.layers[1].self_attn
    seen = method.observe(attention, inputs, layer_rotary(donor.model.rotary_emb, donor.config, 1, 48))
    targets, other = torch.randn(6, 48, 32), torch.randn(6, 48, 32)
    other[:5] = targets[:5]
    maps = [mixer_layer(method.config, seen, inputs, each).mixer.out_proj.weight for each in (targets, other)]
    assert torch.equal(*maps)
    other[4] += 1
    assert not torch.equal(maps[0], mixer_layer(method.config, seen, inputs, other).mixer.out_proj.weight)


def test_a_neutral_mamba2_is_linear_attention() -> None:
    """No decay, a step of 1, no convolution, no gate, no norm, no skip: the sum of v k · q over what came before."""
    donor, linear, inputs, _ = started("mamba2")
    mixer = linear.mixer.double()
    mixer.A_log.fill_(-math.inf)
    mixer.dt_bias.fill_(float(inverse_softplus(torch.ones((), dtype=torch.float64))))
    mixer.D.zero_()
    mixer.in_proj.weight[-HEADS:] = 0
    mixer.conv1d.weight.copy_((mixer.conv1d.weight > 0).double())
    mixer.activation = None
    mixer.norm = _Ungated()
    mixer.out_proj.weight.copy_(donor.o_proj.weight)
    x = inputs.double()
    q, k, v = (
        torch.einsum("nld,hed->nhle", x, by_heads(p, n).double())
        for p, n in ((donor.q_proj, HEADS), (donor.k_proj, GROUPS), (donor.v_proj, GROUPS))
    )
    heads = (q @ k.mT).tril() @ v
    expected = heads.transpose(1, 2).flatten(2) @ donor.o_proj.weight.double().mT
    # transformers' scan computes in float32
    assert relative_error(linear(x)[0].float(), expected.float()) < 1e-10


class _Ungated(nn.Module):
    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_scan_is_the_recurrence(mixer: Mixer) -> None:
    """Against the papers' equations, token by token, from what the mixer's maps give."""
    _, linear, inputs, _ = started(mixer)
    module, x = linear.mixer, inputs[:1]
    read: list[Tensor] = []
    hook = module.norm.register_forward_pre_hook(lambda _, a: read.append(a[0]))
    linear(x)
    hook.remove()
    found = read[0].view(48, HEADS, WIDTH)
    taps = module.conv1d.weight[:, 0, -1]

    def convolved(parts: list[Tensor]) -> list[Tensor]:
        joined = nn.functional.silu(torch.cat(parts, dim=-1) * taps)
        return [part.view(48, HEADS, WIDTH) for part in joined.split(HEADS * WIDTH, dim=-1)]

    state, outputs = torch.zeros(HEADS, WIDTH, WIDTH), []  # values by keys
    if mixer == "mamba2":
        inner = HEADS * WIDTH
        _, *parts, dt = module.in_proj(x)[0].split([inner, inner, inner, inner, HEADS], dim=-1)
        v, k, q = convolved(parts)
        step = nn.functional.softplus(dt + module.dt_bias)
        for t in range(48):
            decay = torch.exp(-step[t] * module.A_log.exp())[:, None, None]
            state = decay * state + step[t][:, None, None] * v[t][:, :, None] * k[t][:, None]
            outputs.append((state * q[t][:, None]).sum(-1) + module.D[:, None] * v[t])
    else:
        q, k, v, _, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
        q, k, v = convolved([part[0].flatten(1) for part in (q, k, v)])
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        decays = torch.exp(-module.A_log.exp() * nn.functional.softplus(a[0] + module.dt_bias))
        for t in range(48):
            state = decays[t][:, None, None] * state
            new = v[t] - (state * k[t][:, None]).sum(-1)
            state = state + b[0, t].sigmoid()[:, None, None] * new[:, :, None] * k[t][:, None]
            outputs.append((state * q[t][:, None]).sum(-1) / math.sqrt(WIDTH))
    assert relative_error(found, torch.stack(outputs)) < 1e-8


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("starcoder2", {"use_bias": True}),
        ("phi3", {"pad_token_id": 1}),
        ("olmo2", {}),
    ],
)
@torch.no_grad()
def test_the_maps_of_every_kind_of_attention_give_its_queries_keys_and_values(
    family: str, config: dict[str, Any]
) -> None:
    """Those that the donor's own modules give, but for the division by an RMS in a QK-norm."""
    donor = donor_model(layers=3, hidden=32, family=family, **config)
    attention, generator = donor.model.layers[1].self_attn, torch.Generator().manual_seed(0)
    for name, parameter in attention.named_parameters():
        if name.endswith("bias") or "norm" in name:  # which are 0 or 1 at first
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    reads_one, x = torch.randn(32, generator=generator), torch.randn(7, 32, generator=generator)
    x = x + (1 - x @ reads_one)[:, None] * reads_one / reads_one.square().sum()
    method = HybridMLA(donor.config, HybridSettings(0.9, linear_layers=[1]), "quick")
    seen = method.observe(attention, x[None], layer_rotary(donor.model.rotary_emb, donor.config, 1, 7))
    maps = head_maps(seen, HEADS, GROUPS, reads_one.double())

    width = getattr(donor.config, "head_dim", None) or WIDTH
    if family == "phi3":
        written = attention.qkv_proj(x).split([HEADS * width, GROUPS * width, GROUPS * width], dim=-1)
    else:
        written = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    q, k, v = (each.unflatten(-1, (-1, width)) for each in written)
    if family in ("qwen3", "olmo2"):
        q, k = (
            _normed_but_not_divided(norm, each)
            for norm, each in ((attention.q_norm, q), (attention.k_norm, k))
        )
    for found, expected in ((maps.q, q), (maps.k, k), (maps.v, v)):
        of_heads = torch.stack([expected[:, head * expected.shape[1] // HEADS] for head in range(HEADS)], 1)
        assert relative_error(torch.einsum("tx,hdx->thd", x.double(), found), of_heads.double()) < 1e-9
    o = x.new_ones(HEADS * width)
    assert torch.allclose(maps.o @ o.double() + maps.o_bias, attention.o_proj(o).double(), atol=1e-4)


def _normed_but_not_divided(norm: Any, heads: Tensor) -> Tensor:
    """(T, H, d) times the gains of `norm`, of a head or of all together: its result times the RMS of what it reads."""
    parts = heads.flatten(1).unflatten(-1, (-1, len(norm.weight)))
    size = (parts.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return (norm(parts) * size).flatten(1).view(heads.shape)


def test_a_constant_is_read_from_what_tokens_have_in_common() -> None:
    x = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    x[..., 3] = 2.0
    reads_one = constant_reader(x)
    assert (x.double() @ reads_one - 1).abs().max() < 1e-3


def test_no_other_output_map_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 40, n, generator=generator) for n in (8, 5))
    best = output_map(x, y)
    error = relative_error(x.double() @ best.mT, y.double())
    for _ in range(5):
        other = best + 0.05 * torch.randn(best.shape, generator=generator)
        assert relative_error(x.double() @ other.mT, y.double()) > error
