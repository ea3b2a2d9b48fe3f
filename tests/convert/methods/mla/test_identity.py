"""What must hold exactly before anything is compressed.

Tolerances: float32 keeps 6e-8; sums of 64 to 128 terms, factors up to the spread of the heads' query energies, and two
layers leave below 1e-5. Where the computation runs in float64, below 1e-9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mhconvert.convert.attention.projections import attention_weights
from mhconvert.convert.attention.weights import LayerStatistics
from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.families.facts import attention_facts
from mhconvert.convert.methods.mla.modeling_mla import LatentAttention
from mhconvert.convert.methods.mla.rotary_components import rotary_basis
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.mla.slot_embeddings import rotated, turns
from mhconvert.convert.methods.mla.surgery import LatentWeights, convert_layer
from tests.convert.conversions import (
    LINEAR,
    LLAMA3,
    YARN,
    attention_inputs,
    converted,
    donor_model,
    logits,
    relative,
    rotary_of,
    token_ids,
)
from tests.convert.methods.mla.layers import nope_width

FLOAT32, FLOAT64 = 1e-5, 1e-9
ALL = MLASettings(kv_budget=1.0, kv_bits="16")


def expect_identity(donor: Any) -> None:
    """Budget 1 gives the donor back: each layer's attention output, the logits, and the size of the cache."""
    model, ids = converted(donor, ALL), token_ids(2, 40, seed=7)
    embeddings = rotary_of(donor, 40)
    for stock, latent, x in zip(
        donor.model.layers, model.model.layers, attention_inputs(donor, ids), strict=True
    ):
        with torch.no_grad():
            expected = stock.self_attn(x, embeddings, None)[0]
            assert relative(latent.self_attn(x, embeddings, None)[0], expected) < FLOAT32
    assert relative(logits(model, ids), logits(donor, ids)) < FLOAT32
    caches = [m(input_ids=ids, use_cache=True).past_key_values for m in (model, donor)]
    assert cache_storage(caches[0]) == cache_storage(caches[1])


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whole_budget_is_the_donor(kv_heads: int, seed: int) -> None:
    expect_identity(donor_model(seed, kv_heads=kv_heads))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=["llama3", "yarn", "linear"])
def test_the_whole_budget_with_another_rope(rope: dict[str, Any]) -> None:
    donor = donor_model(rope=rope)
    assert (donor.model.rotary_emb.attention_scaling != 1) == (rope is YARN)
    expect_identity(donor)


@pytest.mark.parametrize(
    "config", [{"family": "mistral", "sliding_window": None}, {"tied": False, "head_dim": 32}]
)
def test_the_whole_budget_of_another_shape(config: dict[str, Any]) -> None:
    expect_identity(donor_model(**config))


def rows_of(seed: int = 3) -> Tensor:
    """(2, 24, 64) float64 rows with a mean and unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 24, 64, generator=generator, dtype=torch.float64)
    return rows * torch.linspace(0.2, 2, 64, dtype=torch.float64) + torch.randn(64, generator=generator)


def statistics_of(rows: Tensor, phases: Tensor, gain: float = 1.0) -> LayerStatistics:
    """The plain moments of `rows`, with the `phases` given."""
    tokens = rows.flatten(0, 1)
    moment = tokens.mT @ tokens / len(tokens)
    return LayerStatistics(moment, moment, tokens.mean(0), phases, gain)


def latent_attention(donor: Any, latent: LatentWeights) -> LatentAttention:
    """The module of `latent` in float64."""
    config = donor.config
    config.kv_lora_rank = len(latent.kv_a_proj_with_mqa) - 2 * len(latent.frequencies)
    config.latent_rank = lambda _: config.kv_lora_rank
    config.rope_in_latent = latent.kv_b_proj.shape[1] > config.kv_lora_rank
    config.layer_frequencies = lambda _: latent.frequencies
    config.nope_width, config.v_head_dim = lambda _: nope_width(latent), config.head_dim
    config.attention_output_bias, config.attention_input_bias = True, False
    config.softmax_scale = config.attention_softcap = config.qk_norm = None
    config.num_key_scales, config.layer_window = 0, lambda _: None
    module = LatentAttention(config, 0).double().eval()
    state = {f"{name}.weight": getattr(latent, name) for name, _ in module.named_children()}
    module.load_state_dict(state | {"o_proj.bias": latent.o_bias}, strict=True)
    return module


def constant_phase_attention(
    attention: Any, config: Any, rows: Tensor, kept: Tensor, phases: Tensor, angles: Tensor, gain: float
) -> np.ndarray:
    """The donor's attention with RoPE in the `kept` components alone, from the definitions, in complex numbers.

    kept (F, G): by frequency and rank of the component's variance. In the others exp(−iθΔ) is phases (H, F).
    gain: what the rope multiplies every score by.
    """
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    half, x = width // 2, rows.numpy()
    batch, length, _ = x.shape

    def project(linear: nn.Linear, count: int) -> np.ndarray:
        return (x @ linear.weight.detach().double().numpy().T).reshape(batch, length, count, width)

    q, k, v = (
        project(p, n)
        for p, n in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), (heads, groups, groups), strict=True
        )
    )
    q, z = q[..., :half] + 1j * q[..., half:], k[..., :half] + 1j * k[..., half:]
    of = np.arange(heads) // (heads // groups)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    scores = np.zeros((batch, heads, length, length))
    for f in range(half):
        energy = (
            np.array([(np.abs(q[:, :, of == g, f]) ** 2).mean((0, 1)).sum() for g in range(groups)]) ** 0.5
        )
        weighted = (z[..., f] * energy).reshape(-1, groups)
        values, vectors = np.linalg.eigh(np.einsum("ng,nh->gh", weighted, weighted.conj()) / len(weighted))
        for rank, which in enumerate(np.argsort(-values)):
            axis = vectors[:, which]
            part = np.einsum(
                "g,h,blh->blg", axis / energy, axis.conj() * energy, z[..., f]
            )  # of each head's key
            turn = np.exp(-1j * angles[f].item() * distance) * gain
            for h in range(heads):
                factor = turn if kept[f, rank] else phases[h, f].item()
                product = q[:, :, None, h, f].conj() * part[:, None, :, of[h]]
                scores[:, h] += (product * factor).real
    scores = np.where(distance >= 0, scores * width**-0.5, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", shares, v[:, :, of]).reshape(batch, length, -1)
    return mixed @ attention.o_proj.weight.detach().double().numpy().T


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rope", [{}, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "rope_in_latent"])
def test_the_full_rank_is_a_donor_with_constant_phases(
    kv_heads: int, rope: dict, share: float, together: bool
) -> None:
    donor, rows = donor_model(kv_heads=kv_heads, rope=rope), rows_of()
    config, attention, rotary = donor.config, donor.model.layers[0].self_attn, donor.model.rotary_emb
    generator = torch.Generator().manual_seed(5)
    frequencies = config.head_dim // 2
    phases = torch.polar(*torch.rand(2, 4, frequencies, generator=generator, dtype=torch.float64).unbind())
    kept = torch.rand(frequencies, kv_heads, generator=generator) < share
    gain = rotary.attention_scaling**2
    expected = constant_phase_attention(
        attention, config, rows, kept, phases * gain, rotary.inv_freq.double(), gain
    )

    weights, statistics = (
        attention_weights(attention, attention_facts(config)),
        statistics_of(rows, phases * gain, gain),
    )
    rank = 2 * int((~kept).sum()) + kv_heads * config.head_dim
    basis = rotary_basis(weights, statistics)
    latent = convert_layer(weights, statistics, basis, kept, rank, 0.01, rope_in_latent=together)
    angles = (
        torch.outer(torch.arange(24, dtype=torch.float64), rotary.inv_freq.double()).repeat(1, 2).unsqueeze(0)
    )
    embeddings = (angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling)
    with torch.no_grad():
        output = latent_attention(donor, latent)(rows, embeddings)[0]
    assert latent.kv_a_proj_with_mqa.shape[0] == 2 * kv_heads * config.head_dim
    assert relative(output, torch.from_numpy(expected)) < FLOAT64


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_absorbed_decode_is_expanded_decode(
    kv_heads: int, new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(donor_model(kv_heads=kv_heads))
    ids = token_ids(3, 20, seed=9)
    expand, outputs, expanded = LatentAttention.expand_kv, [], []
    monkeypatch.setattr(LatentAttention, "expand_kv", lambda *a: expanded.append(1) or expand(*a))
    for most, layers in ((new_tokens, 0), (new_tokens - 1, 2)):
        cache = DynamicCache(config=model.config)
        monkeypatch.setattr(LatentAttention, "max_absorbed_tokens", most)
        with torch.no_grad():
            model(input_ids=ids[:, :-new_tokens], past_key_values=cache)
            expanded.clear()
            outputs.append(model(input_ids=ids[:, -new_tokens:], past_key_values=cache).logits)
        assert len(expanded) == layers
    assert relative(*outputs) < 4e-6


def test_rotary_rows_turn_as_in_deepseeks_class_and_score_as_halves_do() -> None:
    model = converted(donor_model())
    attention, x = (
        model.model.layers[0].self_attn,
        torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1)),
    )
    width, rank = attention.qk_rope_head_dim, attention.kv_lora_rank
    halves = torch.arange(width).view(-1, 2).T.flatten()  # r0 r1 … i0 i1 …
    with torch.no_grad():
        q = attention.q_proj(x).view(2, 12, 4, -1).transpose(1, 2)[..., -width:]
        k = attention.kv_a_proj_with_mqa(x)[:, None, :, rank:]
        by = turns(*rotary_of(model, 12), attention.rope_frequencies)
        ours, (cos, sin) = (rotated(q, by), rotated(k, by)), by.unbind(-1)
        theirs = apply_rotary_emb(q, k, torch.complex(cos, sin))
        split = apply_rotary_pos_emb(
            q[..., halves], k[..., halves], torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        )
    assert relative(theirs[0], ours[0]) < FLOAT32
    assert relative(theirs[1], ours[1]) < FLOAT32
    assert relative(split[0] @ split[1].mT, ours[0] @ ours[1].mT) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_rotary_key_turns_wherever_it_lies_in_memory(dtype: torch.dtype, offset: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 1, 1, 7, generator=generator).to(dtype)[..., offset : offset + 6]
    angle = torch.rand(1, 1, 3, generator=generator, dtype=torch.float64) * 6
    z = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * torch.exp(1j * angle)
    found = rotated(x, torch.stack((angle.cos(), angle.sin()), dim=-1))
    assert found.dtype == dtype
    assert relative(found.double(), torch.view_as_real(z).flatten(-2)) < 4 * torch.finfo(dtype).eps


def test_a_constant_on_the_keys_without_rope_changes_nothing() -> None:
    model, ids = converted(donor_model()), token_ids(2, 20)
    expected = logits(model, ids)
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        attention = layer.self_attn
        up = nn.Linear(attention.kv_lora_rank, attention.kv_b_proj.out_features)
        widths = [attention.qk_nope_head_dim, attention.v_head_dim]
        shift = torch.randn(4, sum(widths), generator=generator)
        shift[:, widths[0] :] = 0  # the values keep theirs
        up.weight.data, up.bias.data = attention.kv_b_proj.weight.data, shift.flatten()
        attention.kv_b_proj = up
    assert relative(logits(model, ids), expected) < FLOAT32
