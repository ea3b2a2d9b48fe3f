"""The fidelity sums: values known in closed form, and independence of how the predictions are grouped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.errors import MhconvertError
from mhconvert.eval.fidelity import CHUNK, Fidelity, compare_rows, text_rows
from tests.donors import make_tokenizer

seeds = st.integers(0, 10_000)


def random_logits(seed: int, positions: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocabulary, generator=generator)


def measured(donor: torch.Tensor, converted: torch.Tensor, targets: torch.Tensor) -> dict:
    fidelity = Fidelity()
    fidelity.add(donor, converted, targets)
    return fidelity.result()


@given(seeds, st.integers(1, 40), st.integers(2, 50))
@settings(max_examples=40, deadline=None)
def test_a_model_against_itself(seed: int, positions: int, vocabulary: int) -> None:
    logits = random_logits(seed, positions, vocabulary)
    result = measured(logits, logits.clone(), logits.argmin(-1))
    assert result["kl"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity"]["donor"] == result["perplexity"]["converted"]
    assert result["tokens"] == positions


@given(st.integers(1, 300), st.integers(2, 200), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_uniform_perplexity_is_the_vocabulary(positions: int, vocabulary: int, level: float) -> None:
    logits = torch.full((positions, vocabulary), level)
    result = measured(logits, logits, torch.zeros(positions, dtype=torch.long))
    assert result["perplexity"]["converted"] == pytest.approx(vocabulary, rel=1e-5)


@given(seeds, seeds)
@settings(max_examples=40, deadline=None)
def test_divergence_is_positive_and_blind_to_a_shift(left: int, right: int) -> None:
    donor, converted = random_logits(left, 5, 12), random_logits(right + 20_000, 5, 12)
    targets = torch.zeros(5, dtype=torch.long)
    result = measured(donor, converted, targets)
    assert result["kl"] > 0
    shifted = measured(donor + 7, converted - 3, targets)
    assert shifted["kl"] == pytest.approx(result["kl"], rel=1e-4)  # float32 logits near 20: 2e-6 absolute


@given(seeds, st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_grouping_does_not_matter(seed: int, groups: list[int]) -> None:
    total = sum(groups)
    donor, converted = random_logits(seed, total, 9), random_logits(seed + 1, total, 9)
    targets = torch.randint(9, (total,), generator=torch.Generator().manual_seed(seed))
    parts = Fidelity()
    for d, c, t in zip(donor.split(groups), converted.split(groups), targets.split(groups), strict=True):
        parts.add(d, c, t)
    whole, apart = measured(donor, converted, targets), parts.result()
    assert apart["tokens"] == whole["tokens"]
    assert apart["top1_agreement"] == whole["top1_agreement"]
    assert apart["kl"] == pytest.approx(whole["kl"], rel=1e-12)
    assert apart["perplexity"]["donor"] == pytest.approx(whole["perplexity"]["donor"], rel=1e-12)


def test_against_the_definition() -> None:
    donor, converted = random_logits(1, 300, 30).double(), random_logits(2, 300, 30).double()
    targets = torch.arange(300) % 30
    p, log_p, log_q = donor.softmax(-1), donor.log_softmax(-1), converted.log_softmax(-1)
    result = measured(donor, converted, targets)
    assert result["kl"] == pytest.approx((p * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    expected = torch.nn.functional.cross_entropy(converted, targets).exp().item()
    assert result["perplexity"]["converted"] == pytest.approx(expected, rel=1e-5)


def test_impossible_tokens() -> None:
    """A token both rule out adds nothing; one that only the converted model rules out costs infinitely."""
    donor = torch.tensor([[0.0, 0.0, -math.inf]])
    same = measured(donor, donor, torch.tensor([0]))
    assert same["kl"] == 0
    worse = measured(donor, torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor([1]))
    assert worse["kl"] == math.inf
    assert worse["perplexity"]["converted"] == math.inf


def test_rows_predict_their_next_token() -> None:
    """A model that always bets on the following token, and one that never does."""
    rows = torch.tensor([[1, 2, 3, 0], [3, 2, 1, 0]])

    def knows(ids: torch.Tensor) -> torch.Tensor:
        return 50.0 * torch.nn.functional.one_hot(ids.roll(-1, 1), 4).float()

    def guesses(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 4)

    seen: list[tuple[int, int]] = []
    result = compare_rows(guesses, knows, rows, lambda done, total: seen.append((done, total))).result()
    assert result["tokens"] == 6
    assert result["perplexity"]["donor"] == pytest.approx(4)
    assert result["perplexity"]["converted"] == pytest.approx(1)
    assert seen == [(1, 2), (2, 2)]


def test_text_becomes_rows_without_special_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cache holds the keys and the values\n" * 30, encoding="utf-8")
    tokenizer = make_tokenizer()
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = text_rows(tokenizer, text, 16, 3)
    assert rows.shape == (3, 16)
    assert rows.flatten().tolist() == ids[:48]


def test_text_refusals(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("few words", encoding="utf-8")
    with pytest.raises(
        MhconvertError, match=r"16 × 1024 = 16384 are asked for; choose a shorter --sequence-length"
    ):
        text_rows(make_tokenizer(), text, 1024, 16)
    with pytest.raises(MhconvertError, match=r"absent\.txt cannot be read"):
        text_rows(make_tokenizer(), tmp_path / "absent.txt", 8, 1)
    with pytest.raises(MhconvertError, match="make no prediction"):
        text_rows(make_tokenizer(), text, 1, 1)
    with pytest.raises(MhconvertError, match="no prediction to measure"):
        Fidelity().result()
