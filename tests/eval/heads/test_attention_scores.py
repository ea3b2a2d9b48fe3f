"""Where heads look, on a model whose heads were made by hand."""

from __future__ import annotations

import pytest
import torch

from mhconvert.eval.heads.attention_scores import needle, repetition, repetition_of, retrieval
from mhconvert.eval.needle_text import Case, make_case
from tests.donors import make_config, make_model, make_tokenizer
from tests.eval.heads.induction_model import induction_model

ONCE = [3, 17, 8, 0, 12, 21, 5, 9, 14, 2]
# Filler, the needle 7 1 4 20, filler; then the question 7, and the answer 1 4 20.
NEEDLE = Case((23, 10, 11, 7, 1, 4, 20, 16, 13, 6, 7, 1, 4, 20), 3)


def test_the_hand_made_model_continues_a_repeated_text() -> None:
    ids = torch.tensor([[23, *ONCE, *ONCE]])
    with torch.inference_mode():
        written = induction_model()(ids).logits[0, len(ONCE) + 1 : -1].argmax(-1)
    assert written.tolist() == ONCE[1:]


def test_heads_of_repetition_are_the_ones_that_were_made() -> None:
    before, same, behind = repetition_of(induction_model(), [23, *ONCE, *ONCE], len(ONCE)).unbind(1)
    assert before[0, 0] > 0.95
    assert behind[1, 0] > 0.95
    assert same[1, 1] == pytest.approx(0.5, abs=0.02)  # the other half is on the token itself
    for scores, made in ((before, (0, 0)), (behind, (1, 0)), (same, (1, 1))):
        others = scores.clone()
        others[made] = 0
        assert others.max() < 0.2


def test_the_head_that_copies_the_needle_is_found() -> None:
    assert needle(NEEDLE) == 4
    found = retrieval(induction_model(), [NEEDLE])
    assert found is not None
    most, attention = found.unbind(1)
    assert most[1, 0] == 1
    assert attention[1, 0] > 0.95
    others = attention.clone()
    others[1, 0] = 0
    assert others.max() < 0.2


def test_an_answer_that_is_not_in_the_text_is_left_out() -> None:
    absent = Case((23, 10, 11, 7, 5, 7, 1, 4, 20), 3)
    model = induction_model()
    assert needle(absent) is None
    assert retrieval(model, [absent]) is None
    both, alone = retrieval(model, [absent, NEEDLE]), retrieval(model, [NEEDLE])
    assert both is not None
    assert alone is not None
    assert torch.equal(both, alone)


def test_a_text_of_the_probe_has_its_needle() -> None:
    tokenizer = make_tokenizer()
    case = make_case(tokenizer, 300, 0.5)
    at = needle(case)
    assert at is not None
    assert case.ids[at : at + case.answer] == case.ids[-case.answer :]
    assert at < len(case.ids) - 2 * case.answer


def test_random_weights_have_no_such_heads() -> None:
    model = make_model(make_config(heads=4), std=0.02)
    model.set_attn_implementation("eager")
    scores = repetition(model, make_tokenizer(), 0)
    assert scores.shape == (2, 3, 4)
    assert scores[:, 2].max() < 0.2
