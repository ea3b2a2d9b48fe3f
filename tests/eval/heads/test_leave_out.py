"""What predictions lose without a head: measured as by hand, and estimated where changes are small."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mhconvert.eval.heads.leave_out import Texts, estimated, gated, greedy_set, measured
from tests.donors import make_config, make_model
from tests.eval.heads.induction_model import induction_model
from tests.eval.heads.test_attention_scores import ONCE

HEADS = list(itertools.product(range(2), range(4)))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(make_config(heads=4), std=0.15)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(320, (length,), generator=generator) for length in (9, 12, 12, 20)]


def divergence(model: Any, rows: list[torch.Tensor], layer: int, head: int, last: bool) -> float:
    """The mean KL when a head's columns of o_proj are zero."""
    weight, size = model.model.layers[layer].self_attn.o_proj.weight, model.config.head_dim
    total, count = 0.0, 0
    for row in rows:
        with torch.inference_mode():
            whole = model(row[None]).logits[0].log_softmax(-1)
        with torch.no_grad():
            kept = weight[:, head * size : (head + 1) * size].clone()
            weight[:, head * size : (head + 1) * size] = 0
            left = model(row[None]).logits[0].log_softmax(-1)
            weight[:, head * size : (head + 1) * size] = kept
        kl = (whole.exp() * (whole - left)).sum(-1)
        kl = kl[-1:] if last else kl
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count


@pytest.mark.parametrize("last", [False, True])
def test_measured_as_with_zero_columns(model: Any, rows: list[torch.Tensor], last: bool) -> None:
    found = measured(model, Texts(rows, last), [[head] for head in HEADS])
    expected = [divergence(model, rows, *head, last) for head in HEADS]
    assert found == pytest.approx(expected, rel=1e-3)  # float32 sums over a vocabulary of 320
    assert measured(model, Texts(rows, last), [[]]) == [0]


@pytest.mark.parametrize("last", [False, True])
def test_the_estimate_is_the_measurement_where_heads_do_little(rows: list[torch.Tensor], last: bool) -> None:
    """Second order is exact in the limit; 400 draws a prediction leave 10 % of noise to a head."""
    model = make_model(make_config(heads=4), std=0.15)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.02
    found = estimated(model, Texts(rows, last), samples=400, seed=0).flatten().tolist()
    exact = [divergence(model, rows, *head, last) for head in HEADS]
    assert found == pytest.approx(exact, rel=0.3)
    assert sorted(HEADS, key=lambda h: found[HEADS.index(h)])[-1] == max(
        HEADS, key=lambda h: exact[HEADS.index(h)]
    )


def test_in_the_hand_made_model_two_heads_matter() -> None:
    made, text = induction_model(), Texts([torch.tensor([23, *ONCE, *ONCE])], last=False)
    before, nothing, copies, same = measured(made, text, [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]])
    assert min(before, copies) > 1
    assert max(nothing, same) == 0
    scores = estimated(made, text, samples=8, seed=0)
    assert scores[0, 1] == scores[1, 1] == 0
    assert scores[1, 0] > 0


def test_the_set_grows_by_what_adds_most(model: Any, rows: list[torch.Tensor]) -> None:
    texts = Texts(rows, last=True)
    alone = measured(model, texts, [[head] for head in HEADS])
    found = greedy_set(model, texts, HEADS, alone, 3)
    chosen = [head for head, _ in found]
    assert found[0] == (HEADS[alone.index(max(alone))], max(alone))
    for size in (2, 3):
        others = [head for head in HEADS if head not in chosen[: size - 1]]
        together = measured(model, texts, [[*chosen[: size - 1], head] for head in others])
        assert found[size - 1] == (others[together.index(max(together))], pytest.approx(max(together)))


def test_gates_are_gone_afterwards(model: Any, rows: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        before = model(rows[0][None]).logits
        with gated(model, torch.zeros(1, 2, 4)):
            assert not torch.equal(model(rows[0][None]).logits, before)
        with pytest.raises(IndexError), gated(model, torch.zeros(1, 1, 4)):
            model(rows[0][None])
        assert torch.equal(model(rows[0][None]).logits, before)
