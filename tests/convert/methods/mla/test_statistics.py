"""What calibration text says of a layer: moments, phases, and the tokens that attention reads most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mhconvert.convert.attention.projections import attention_weights
from mhconvert.convert.attention.statistics import observe
from mhconvert.convert.attention.weights import LayerStatistics
from mhconvert.convert.families.facts import attention_facts
from mhconvert.convert.methods.mla.assembly import NormedWeights
from mhconvert.convert.methods.mla.method import MLA
from mhconvert.convert.methods.mla.observed import Observed
from mhconvert.convert.methods.mla.rotary_components import kept_components, rotary_basis
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.mla.surgery import convert_layer
from tests.convert.conversions import YARN, attention_inputs, donor_model, relative, rotary_of, token_ids

LENGTH = 64
MOMENTS = 1e-5  # sums of a few hundred float32 products


def observed(donor: Any, inputs: Tensor) -> LayerStatistics:
    rotary = donor.model.rotary_emb
    embeddings = rotary_of(donor, inputs.shape[1])
    attention = donor.model.layers[0].self_attn
    return observe(attention, donor.config, inputs, embeddings, rotary.inv_freq, rotary.attention_scaling)


def eager_shares(donor: Any, inputs: Tensor) -> Tensor:
    """(N, H, L, L) attention weights of the first layer by transformers' eager attention."""
    length = inputs.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1).expand(len(inputs), 1, -1, -1)
    donor.set_attn_implementation("eager")
    with torch.no_grad():
        return donor.model.layers[0].self_attn(inputs, rotary_of(donor, length), mask)[1]


def spread(moment: Tensor, share: float) -> Tensor:
    """A share of a moment's energy laid evenly on all directions."""
    return (1 - share) * moment + share * moment.trace() / len(moment) * torch.eye(len(moment)).double()


@pytest.mark.parametrize("rope", [{}, YARN], ids=["default", "yarn"])
def test_moments_and_phases_are_those_of_the_definitions(rope: dict[str, Any]) -> None:
    donor = donor_model(rope=rope)
    inputs = attention_inputs(donor, token_ids(13, 20))[0]  # 4 tokens for each direction
    found, shares = observed(donor, inputs), eager_shares(donor, inputs).double()
    tokens = inputs.flatten(0, 1).double()
    assert relative(found.query_moment, spread(tokens.mT @ tokens / len(tokens), 1e-4)) < MOMENTS
    received = shares.square().sum((1, 2)).flatten()
    received = 0.3 * received / received.sum() + 0.7 / len(tokens)
    assert relative(found.key_moment, spread((tokens * received[:, None]).mT @ tokens, 1e-4)) < MOMENTS
    assert relative(found.key_mean, received @ tokens) < MOMENTS

    read = shares.sum(0)
    read[:, :, 0] = 0  # the sink
    distance = (torch.arange(20)[:, None] - torch.arange(20)).double()
    turns = torch.exp(-1j * donor.model.rotary_emb.inv_freq.double()[:, None, None] * distance)
    gain = donor.model.rotary_emb.attention_scaling**2
    expected = gain * torch.einsum("hts,fts->hf", read.to(turns.dtype), turns) / read.sum((1, 2))[:, None]
    assert found.rope_gain == pytest.approx(gain)
    assert (found.phases - expected).abs().max() < MOMENTS
    assert found.phases.abs().max() <= gain


@pytest.mark.parametrize("rows", [1, 4, 12])
def test_too_few_tokens_spread_some_energy_over_all_directions(rows: int) -> None:
    """In proportion to what is missing to 4 tokens a direction; the energy itself stays."""
    donor = donor_model()
    inputs = attention_inputs(donor, token_ids(rows, 20))[0]
    tokens = inputs.flatten(0, 1).double()
    plain, found = tokens.mT @ tokens / len(tokens), observed(donor, inputs).query_moment
    assert relative(found, spread(plain, 0.1 * (1 - 20 * rows / 256))) < MOMENTS
    assert torch.linalg.matrix_rank(found) == 64
    assert found.trace().item() == pytest.approx(plain.trace().item())


def sink_donor(seed: int, kv_heads: int) -> tuple[Any, Tensor]:
    """A donor that reads the first token of each row most of the time, and inputs (10, L, D) for its first layer.

    The sink is the one token with element 0; every other has element 1, whose query meets the sink's key.
    """
    donor, generator = donor_model(seed, kv_heads=kv_heads), torch.Generator().manual_seed(seed)
    attention = donor.model.layers[0].self_attn
    inputs = torch.randn(10, LENGTH, 64, generator=generator)
    inputs[..., 0], inputs[..., 1] = 0, 1
    inputs[:, 0] = 0
    inputs[:, 0, 0] = 6
    query = torch.randn(4, 16, generator=generator)
    with torch.no_grad():
        attention.q_proj.weight[:, 1] = query.flatten()
        attention.k_proj.weight[:, 0] = query.view(kv_heads, -1, 16).mean(1).flatten()
        attention.v_proj.weight[:, 0] = 0
    return donor, inputs


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counting_keys_by_attention_saves_the_sink(seed: int, kv_heads: int) -> None:
    donor, inputs = sink_donor(seed, kv_heads)
    fit, held_out = inputs[:7], inputs[7:]
    shares = eager_shares(donor, held_out)
    assert shares[:, :, 10:, 0].mean() > 0.4  # of what 11 to 64 tokens share
    attended = observed(donor, fit)
    tokens = fit.flatten(0, 1).double()
    uniform = replace(attended, key_moment=attended.query_moment, key_mean=tokens.mean(0))
    method = MLA(donor.config, MLASettings(kv_budget=0.375, kv_bits="16"), "quick")
    attention, embeddings, errors = donor.model.layers[0].self_attn, rotary_of(donor, LENGTH), []
    donor.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = attention(held_out, embeddings, None)[0]
        for statistics in (attended, uniform):
            weights = attention_weights(attention, attention_facts(donor.config))
            basis = rotary_basis(weights, statistics)
            count = method.budget.elements // 8
            kept = kept_components(basis.damage, count)
            rank = method.budget.elements - 2 * count
            latent = convert_layer(weights, statistics, basis, kept, rank, 0.01, rope_in_latent=True)
            seen = Observed(NormedWeights(weights, weights), torch.zeros(64), statistics, basis)
            module = method._module(latent, seen, 0, torch.device("cpu"))
            errors.append(relative(module(held_out, embeddings, None)[0], expected) ** 2)
    assert errors[0] < 0.8 * errors[1]
