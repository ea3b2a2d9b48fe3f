"""Moments of few tokens: what a code made from them costs in other text, and that parts of the text are the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mhconvert.convert.methods import layer_sensitivity
from mhconvert.convert.methods.layer_sensitivity import LayerMoments, LayerSensitivity
from mhconvert.convert.methods.mla.bit_allocation import allocate
from mhconvert.convert.methods.mla.code_basis import code_basis, shrunk_spectrum
from mhconvert.convert.methods.mla.code_levels import normal_levels

ELEMENTS = 48
BYTES = 20  # of a row: about an eighth of 16 bits an element


def correlated(count: int, seed: int) -> Tensor:
    """(count, ELEMENTS) of a known covariance, whose eigenvalues fall by three orders of magnitude."""
    mixing = torch.linalg.qr(torch.randn(2, ELEMENTS, ELEMENTS, generator=torch.Generator().manual_seed(0)))
    spread = torch.logspace(0, -1.5, ELEMENTS, dtype=torch.float64)
    drawn = torch.randn(count, ELEMENTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * spread @ mixing[0][0].double().mT


def survey(tokens: int, seed: int = 1) -> LayerSensitivity:
    """What a survey gathers from so many tokens, with the price of many more, which is not what is compared."""
    generator = torch.Generator().manual_seed(seed + 100)
    gradients = torch.randn(20_000, ELEMENTS, generator=generator, dtype=torch.float64)
    moments, priced = LayerMoments(ELEMENTS), LayerMoments(ELEMENTS)
    moments.add(correlated(tokens, seed), gradients[:tokens])
    priced.add(gradients, gradients)
    return dataclasses.replace(moments.sensitivity(), price=priced.price)


def plain(layer: LayerSensitivity) -> LayerSensitivity:
    """The same moments, as if of so many tokens that nothing is shrunk."""
    return dataclasses.replace(layer, tokens=torch.tensor(10**12))


def realised(layer: LayerSensitivity) -> float:
    """What the code of `layer` costs on fresh tokens, nats a token."""
    basis = code_basis(layer)
    [bits] = allocate([basis.divergence], BYTES)
    centred = correlated(20_000, 9) - layer.mean
    components = centred @ basis.down.mT
    gain = components[:, bits > 0].square().mean(-1, keepdim=True).sqrt()
    coded = torch.zeros_like(components)
    for width in bits.unique().tolist():
        if width:
            levels, chosen = normal_levels(width), bits == width
            bounds = (levels[1:] + levels[:-1]) / 2
            coded[:, chosen] = levels[torch.bucketize((components / gain)[:, chosen], bounds)] * gain
    error = centred - coded @ basis.up.mT
    return 0.5 * float(((error @ layer.price.double()) * error).sum(-1).mean())


@pytest.mark.parametrize(("tokens", "part"), [(40, 0.55), (51, 0.7), (100, 0.95)])
def test_few_tokens_cost_less_when_the_spectrum_is_shrunk(tokens: int, part: float) -> None:
    """51 tokens are 1.06 for each element. `part`: of the cost without shrinkage, mean of eight surveys."""
    surveys = [survey(tokens, seed) for seed in range(1, 9)]
    assert sum(map(realised, surveys)) < part * sum(realised(plain(each)) for each in surveys)


def test_many_tokens_cost_the_same() -> None:
    layer = survey(20 * ELEMENTS)
    assert realised(layer) == pytest.approx(realised(plain(layer)), rel=0.03)


def test_shrinkage_finds_the_variances_of_other_text() -> None:
    """The eigenvectors' variances in fresh tokens, within 30 % in the mean; unshrunk, most are 3 times too small."""
    values, vectors = torch.linalg.eigh(correlated(60, 1).mT.cov())
    fresh = correlated(50_000, 2) @ vectors
    true, found = fresh.var(0), shrunk_spectrum(values, 59)
    assert (found.diff() >= 0).all()
    assert float(found.sum()) == pytest.approx(float(values.sum()))
    assert (found / true).log().abs().mean() < 0.3
    assert (values / true).log().abs().mean() > 1


def test_parts_of_the_text_are_the_whole() -> None:
    values, gradients = correlated(300, 1), correlated(300, 2)
    whole, parts = LayerMoments(ELEMENTS), LayerMoments(ELEMENTS)
    whole.add(values, gradients)
    for begin, end in ((0, 90), (90, 120), (120, 300)):
        parts.add(values[begin:end] + 0.0, gradients[begin:end])
    mean = values.mean(0)
    torch.testing.assert_close(parts.mean, mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.covariance, (values - mean).mT @ (values - mean) / 300)
    torch.testing.assert_close(parts.covariance, whole.covariance)
    assert parts.count == whole.count == 300


def test_a_sample_is_spread_over_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_sensitivity, "SAMPLE_TOKENS", 40)
    values, moments = correlated(190, 1), LayerMoments(ELEMENTS)
    for begin, end in ((0, 30), (30, 90), (90, 190)):  # 30 of the 40, then 10 of 60, then no more
        moments.begin(values[begin : begin + 1])
        moments.add(values[begin:end], values[begin:end])
    found = moments.sensitivity()
    assert torch.equal(found.sample, torch.cat((values[:30], values[30:90:6])).float())
    torch.testing.assert_close(found.first, (values[0] + values[30] + values[90]) / 3)


def test_directions_that_a_layer_cannot_write_stay_empty() -> None:
    """Where keys and values have more elements than the hidden state, as in multi-head attention."""
    basis = torch.randn(ELEMENTS, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = torch.linalg.eigvalsh((correlated(60, 1)[:, :20] @ basis.mT).mT.cov())
    found = shrunk_spectrum(values, 59)
    assert (found[:28] == 0).all()
    assert (found[28:30] > 1.1 * values[28:30]).all()


def test_degenerate_spectra_come_through() -> None:
    nothing = torch.zeros(4, dtype=torch.float64)
    assert (shrunk_spectrum(nothing, 100) == 0).all()
    for samples in (0, 1, 3, 4, 5):
        assert shrunk_spectrum(torch.tensor([0.0, 0.0, 1.0, 2.0]).double(), samples).isfinite().all()
