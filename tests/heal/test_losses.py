"""The chunked loss is the whole one: values, gradients of states and head, and what does not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhconvert.heal import losses
from mhconvert.heal.losses import Predictions, chunked_loss, divergence, hidden_error

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


def log_probabilities(seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """(teacher, student), (9, 37), float64; the student's logits differ by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    logits, change = (torch.randn(9, 37, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.log_softmax(-1), (logits + noise * change).log_softmax(-1)


def test_divergences_are_the_papers_divided_by_their_scale() -> None:
    teacher, student = log_probabilities(3, 1.0)
    kl = (teacher.exp() * (teacher - student)).sum()
    reverse = (student.exp() * (student - teacher)).sum()
    assert divergence(teacher, student, 0.0).item() == pytest.approx(kl.item())
    assert divergence(teacher, student, 1.0).item() == pytest.approx(reverse.item())
    mixture = 0.3 * teacher.exp() + 0.7 * student.exp()
    parts = [(log.exp() * (log - mixture.log())).sum() for log in (teacher, student)]
    expected = (0.3 * parts[0] + 0.7 * parts[1]) / (0.3 * 0.7)
    assert divergence(teacher, student, 0.3).item() == pytest.approx(expected.item())
    for limit, near in ((kl, 1e-6), (reverse, 1 - 1e-6)):
        assert divergence(teacher, student, near).item() == pytest.approx(limit.item(), rel=1e-4)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.01, 0.99, 1 - 1e-3, 1 - 1e-6])
def test_divergences_near_the_ends_are_right_in_float32(beta: float, noise: float) -> None:
    teacher, student = log_probabilities(5, noise)
    mixture = beta * teacher.exp() + (1 - beta) * student.exp()
    forward, reverse = ((log.exp() * (log - mixture.log())).sum() for log in (teacher, student))
    exact = forward / (1 - beta) + reverse / beta
    found = divergence(teacher.float(), student.float(), beta)
    assert found.item() == pytest.approx(exact.item(), rel=2e-3)


def test_divergences_agree_where_the_models_nearly_do() -> None:
    teacher, student = log_probabilities(4, 1e-3)
    found = [divergence(teacher, student, beta).item() for beta in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert found == pytest.approx([found[0]] * 5, rel=1e-2)
    far = [divergence(*log_probabilities(4, 2.0), beta).item() for beta in (0.0, 0.5, 1.0)]
    assert len({round(value) for value in far}) == 3


def test_a_token_that_the_teacher_rules_out_is_no_number_too_many() -> None:
    """Logits of −∞ add nothing to KL(teacher ‖ student), nor to a mixture's divergences more than its bound."""
    teacher, student = log_probabilities(5, 1.0)
    teacher = torch.where(torch.arange(37) == 4, -torch.inf, teacher)
    for beta in (0.0, 0.5):
        leaf = student.clone().requires_grad_(True)
        value = divergence(teacher, leaf, beta)
        value.backward()
        assert value.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
