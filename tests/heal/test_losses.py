"""The chunked loss is the whole one: values, gradients of states and head, and what does not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhconvert.heal import losses
from mhconvert.heal.losses import Predictions, chunked_loss, hidden_error

CLOSE = 1e-5  # float32 sums of a few hundred terms


def problem(
    positions: int, seed: int, vocab: int = 37
) -> tuple[Tensor, Tensor, Tensor, nn.Linear, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    heads = [nn.Linear(width, vocab) for width in (12, 20)]
    for head in heads:
        nn.init.normal_(head.weight, generator=generator)
    student = torch.randn(positions, 12, generator=generator)
    teacher = torch.randn(positions, 20, generator=generator)
    return student, teacher, torch.randint(vocab, (positions,), generator=generator), heads[0], heads[1]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_chunks_make_no_difference(chunk: int, kl: float, ce: float, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets, head, expert = problem(23, seed=1)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 37 * chunk)
    states = student.clone().requires_grad_(True)
    found = Predictions(states, teacher, targets, head, expert, 37)
    loss, sums = chunked_loss(found, head, kl, ce)
    (loss * 0.25).backward()
    ours = [states.grad, head.weight.grad, head.bias.grad]

    plain = student.clone().requires_grad_(True)
    head.zero_grad()
    logits = F.log_softmax(head(plain), -1)
    theirs = F.log_softmax(expert(teacher), -1).detach()
    divergence = F.kl_div(logits, theirs, reduction="sum", log_target=True)
    entropy = F.nll_loss(logits, targets, reduction="sum")
    (0.25 * (kl * divergence + ce * entropy)).backward()
    torch.testing.assert_close(sums, torch.stack((divergence, entropy)).detach(), rtol=CLOSE, atol=CLOSE)
    for one, other in zip(ours, [plain.grad, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=CLOSE, atol=CLOSE)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    _, teacher, targets, _, expert = problem(9, seed=2)
    states = teacher.clone().requires_grad_(True)
    loss, _ = chunked_loss(Predictions(states, teacher, targets, expert, expert, 37), expert, 1.0, 0.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert states.grad is not None
    assert states.grad.abs().max() < 1e-6


def test_padding_of_the_vocabulary_does_not_count() -> None:
    student, teacher, targets, head, expert = problem(9, seed=3)
    wider = nn.Linear(20, 45)
    with torch.no_grad():
        wider.weight[:37], wider.bias[:37] = expert.weight, expert.bias
    loss, _ = chunked_loss(Predictions(student, teacher, targets, head, expert, 37), head, 1.0, 0.0)
    padded, _ = chunked_loss(Predictions(student, teacher, targets, head, wider, 37), head, 1.0, 0.0)
    assert padded.item() == pytest.approx(loss.item(), rel=1e-6)


def test_without_a_teacher_there_is_the_text_alone() -> None:
    student, _, targets, head, _ = problem(9, seed=4)
    loss, sums = chunked_loss(Predictions(student, None, targets, head, head, 37), head, 1.0, 1.0)
    assert sums[0] == 0
    assert loss.item() == pytest.approx(
        F.cross_entropy(head(student), targets, reduction="sum").item(), rel=1e-5
    )


def test_a_token_that_the_teacher_rules_out_adds_nothing() -> None:
    student, expert = torch.randn(1, 4), torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    divergence, _ = losses.terms(student, expert, torch.tensor([1]))
    three = [0, 1, 3]
    ours, theirs = student.log_softmax(-1)[:, three], expert[:, three].log_softmax(-1)
    assert divergence.item() == pytest.approx((theirs.exp() * (theirs - ours)).sum().item(), rel=1e-5)


def test_errors_of_hidden_states_count_only_where_something_is_predicted() -> None:
    teacher = torch.ones(1, 3, 4)
    student = teacher.clone()
    student[0, 0] *= 3  # a relative squared error of 4
    student[0, 2] = torch.nan
    seen = torch.tensor([[True, True, False]])
    assert hidden_error(student, teacher, seen).item() == pytest.approx(4.0)
