"""Routers in closed form: what they are fitted to, on tokens whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhconvert.convert.attention.rotary import layer_rotary
from mhconvert.convert.methods.moh.converted_class import mixture_config
from mhconvert.convert.methods.moh.method import MoH
from mhconvert.convert.methods.moh.observed import observe
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.methods.moh.surgery import RoutingStatistics, linear_scores, norm_scores, shared_units
from tests.convert.conversions import attention_inputs, converted, donor_model, token_ids


def statistics(x: Tensor, log_energies: Tensor, norms: Tensor | None = None) -> RoutingStatistics:
    found = RoutingStatistics.empty(x.shape[1], log_energies.shape[1])
    size = torch.ones_like(log_energies) if norms is None else norms
    for part in range(0, len(x), 100):
        piece = slice(part, part + 100)
        found.add(x[piece], log_energies[piece].exp(), size[piece].square())
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_energies_that_are_log_linear_are_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 12, generator=generator)
    truth, bias = torch.randn(5, 12, generator=generator), torch.randn(5, generator=generator)
    found = statistics(x, x @ truth.mT + bias)
    weight, offset = linear_scores(found, [4, 0, 2])
    torch.testing.assert_close(weight.float(), truth[[4, 0, 2]], atol=2e-2, rtol=0)
    torch.testing.assert_close(offset.float(), bias[[4, 0, 2]], atol=2e-2, rtol=0)
    assert shared_units(found, 2) == sorted(bias.topk(2).indices.tolist())


def test_scales_and_offsets_of_norms_are_found_and_a_constant_norm_says_nothing() -> None:
    size = torch.randn(500, 3, generator=torch.Generator().manual_seed(2)).exp()
    size[:, 2] = 1.0
    log_energies = torch.tensor([1.5, -0.5, 9.0]) * size.log() + torch.tensor([0.25, 2.0, -1.0])
    scale, offset = norm_scores(statistics(torch.randn(500, 4), log_energies, size), [0, 1, 2])
    assert scale == pytest.approx([1.5, -0.5, 0.0], abs=1e-4)
    assert offset == pytest.approx([0.25, 2.0, -1.0], abs=1e-4)


@pytest.mark.parametrize(("route", "kv_heads"), [("heads", 4), ("heads", 2), ("groups", 2)])
def test_an_energy_is_what_leaving_a_head_out_changes(route: str, kv_heads: int) -> None:
    donor = donor_model(1, heads=4, kv_heads=kv_heads)
    [x, _] = attention_inputs(donor, token_ids(2, 16))
    attention = donor.model.layers[0].self_attn
    rotary = layer_rotary(donor.model.rotary_emb, donor.config, 0, 16)
    seen = observe(attention, mixture_config(donor.config, route), x, rotary.embeddings)
    whole = attention(x, rotary.embeddings, None)[0]
    torch.testing.assert_close(seen.outputs, whole)
    units = 4 if route == "heads" else kv_heads
    weight, width = attention.o_proj.weight.data.clone(), 64 // units
    changes = []
    for unit in range(units):
        attention.o_proj.weight.data = weight.clone()
        attention.o_proj.weight.data[:, unit * width : (unit + 1) * width] = 0
        changes.append((whole - attention(x, rotary.embeddings, None)[0]).square().sum(-1).flatten())
    expected = torch.stack(changes, 1).log().mean(0)
    torch.testing.assert_close(seen.statistics.mean_log_energies.float(), expected, atol=1e-4, rtol=1e-4)
    assert seen.statistics.count == 32


def test_neither_router_changes_a_weight_of_the_donors() -> None:
    donor = donor_model(heads=4, kv_heads=2)
    for router in ("norm", "learned"):
        model = converted(donor, MoHSettings(0.5, 0.25, router=router, uniform=True))  # type: ignore[arg-type]
        state = donor.state_dict()
        own = {name for name in model.state_dict() if ".router." in name}
        assert (not own) == (router == "norm")
        assert model.state_dict().keys() - own == state.keys()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        method = MoH(donor.config, MoHSettings(0.5, 0.25, router=router, uniform=True), "quick")  # type: ignore[arg-type]
        attention = model.model.layers[0].self_attn
        assert method.new_parameters() == sum(p.numel() for p in attention.parameters())
