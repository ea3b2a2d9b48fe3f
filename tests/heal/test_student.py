"""The student: texts of one row apart, the tensors that train, and measurements that agree with plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.errors import HealError
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.distill import fidelity
from mhconvert.heal.packed_rows import Rows
from mhconvert.heal.student import Student, Teacher, Weights, choose_trained, parameter_groups, states
from mhconvert.heal.write_result import merge_adapter
from tests.convert.conversions import donor_model, logits
from tests.heal.models import pair, rows

FLOAT32 = 2e-5


def test_a_text_in_a_packed_row_is_read_as_if_it_stood_alone() -> None:
    student, _ = pair()
    packed = rows(2, 24, cut=(9, 17))
    together = states(student, packed)[-1]
    for begin, end in ((0, 9), (9, 17), (17, 24)):
        alone = states(student, Rows(packed.ids[:, begin:end], packed.positions[:, begin:end]))[-1]
        torch.testing.assert_close(together[:, begin:end], alone, rtol=FLOAT32, atol=FLOAT32)


def test_the_loss_is_that_of_the_whole_logits() -> None:
    student, donor = pair()
    packed = rows(3, 20, cut=(7,))
    found = Student(student, 320)(packed, Teacher(donor), Weights(kl=1.0, ce=0.5))
    ours = torch.cat(
        [logits(student, row) for row in (packed.ids[:, :7].long(), packed.ids[:, 7:].long())], dim=1
    )
    theirs = torch.cat(
        [logits(donor, row) for row in (packed.ids[:, :7].long(), packed.ids[:, 7:].long())], dim=1
    )
    there = packed.predicted()
    ours, theirs = (whole[:, :-1][there].log_softmax(-1) for whole in (ours, theirs))
    kl = (theirs.exp() * (theirs - ours)).sum().item()
    ce = -ours.gather(1, packed.ids[:, 1:][there].long()[:, None]).sum().item()
    assert found["count"] == there.sum() == 3 * 18
    assert found["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert found["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert found["loss"].item() == pytest.approx(kl + 0.5 * ce, rel=1e-4)


def test_rows_of_the_students_own_have_a_divergence_of_their_own_and_no_cross_entropy() -> None:
    student, donor = pair()
    learner, teacher, packed = Student(student, 320), Teacher(donor), rows(3, 20, cut=(7,))
    mixed = Rows(packed.ids, packed.positions, torch.tensor([False, True, False]))
    found = learner(mixed, teacher, Weights(kl=2.0, ce=0.5, beta=1.0))
    text = learner(packed[[0, 2]], teacher, Weights(kl=2.0, ce=0.5))
    own, swapped = packed[[1]], Student(donor, 320)
    reverse = swapped(own, Teacher(student), Weights(kl=1.0))["loss"].item()
    assert (found["own_count"], found["count"]) == (18, 54)
    assert found["own"].item() == pytest.approx(reverse, rel=1e-4)
    assert found["loss"].item() == pytest.approx(text["loss"].item() + 2 * reverse, rel=1e-4)
    for name in ("kl", "ce"):
        assert found[name].item() == pytest.approx(text[name].item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    donor = donor_model()
    model = donor_model()
    found = Student(model, 320)(rows(2, 16), Teacher(donor), Weights(kl=1.0, hidden=1.0))
    found["loss"].backward()
    assert abs(found["loss"].item()) < 1e-4
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) < 1e-4


def test_hidden_states_pull_too() -> None:
    student, donor = pair(0.3)
    found = Student(student, 320)(rows(2, 16), Teacher(donor), Weights(kl=1.0, hidden=2.0))
    ours, theirs = (states(model, rows(2, 16), every_layer=True) for model in (student, donor))
    assert len(ours) == 2
    difference = (ours[0] - theirs[0])[:, :-1].square().sum(-1) / theirs[0][:, :-1].square().sum(-1)
    assert found["hidden"].item() == pytest.approx(difference.sum().item(), rel=1e-4)
    assert found["loss"].item() == pytest.approx(found["kl"].item() + 2 * found["hidden"].item(), rel=1e-5)


def test_the_mean_does_not_depend_on_the_size_of_the_batch() -> None:
    student, donor = pair()
    learner, teacher = Student(student, 320), Teacher(donor)
    whole = learner(rows(4, 16), teacher, Weights(kl=1.0))
    parts = [learner(rows(4, 16)[slice(n, n + 1)], teacher, Weights(kl=1.0)) for n in range(4)]
    assert sum(part["kl"].item() for part in parts) == pytest.approx(whole["kl"].item(), rel=1e-5)
    assert sum(part["count"].item() for part in parts) == whole["count"].item()


def test_what_is_measured_is_what_fidelity_says_of_the_logits() -> None:
    student, donor = pair()
    packed = rows(3, 16)
    found = fidelity(Student(student, 320), Teacher(donor), packed, Fidelity, 2, torch.device("cpu"))
    plain = Fidelity()
    for row in packed.ids.long():
        plain.add(logits(donor, row[None])[0, :-1], logits(student, row[None])[0, :-1], row[1:])
    expected = plain.result()
    assert found["tokens"] == expected["tokens"] == 45
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert found["perplexity"]["converted"] == pytest.approx(expected["perplexity"]["converted"], rel=1e-4)


@pytest.mark.parametrize("train", ["attention", "all", "lora", "hydra"])
def test_what_trains(train: str) -> None:
    student, _ = pair()
    names = {name for name, _ in student.named_parameters()}
    model = choose_trained(student, train, 4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train == "attention":
        assert trained == {name for name in names if ".self_attn." in name}
    elif train == "all":
        assert trained == names
    else:
        assert trained
        assert all(f"{train}_" in name and ".self_attn." in name for name in trained)


@pytest.mark.parametrize("train", ["lora", "hydra"])
def test_an_adapter_changes_nothing_at_first_and_is_merged_at_the_end(train: str) -> None:
    student, _ = pair()
    ids = rows(2, 16).ids.long()
    before, keys = logits(student, ids), set(student.state_dict())
    model = choose_trained(student, train, 4)
    assert torch.equal(logits(model, ids), before)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained = logits(model, ids)
    plain: Any = merge_adapter(model)
    assert set(plain.state_dict()) == keys
    assert (trained - before).abs().max() > 0.01
    torch.testing.assert_close(logits(plain, ids), trained, rtol=1e-3, atol=1e-3)


def test_rates_follow_the_size_of_a_tensor_and_biases_do_not_decay() -> None:
    student, _ = pair()
    model = choose_trained(student, "attention", 4)
    groups = parameter_groups(model, HealSettings(tokens=1, train="attention", lr=0.01, weight_decay=0.1))
    assert len(groups) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        [parameter] = group["params"]
        assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
        if parameter.dim() > 1:
            assert group["lr"] == pytest.approx(0.01 * parameter.square().mean().sqrt().item())


def test_a_model_without_the_asked_tensors_is_refused() -> None:
    with pytest.raises(HealError, match="no tensor that train=attention would change"):
        choose_trained(torch.nn.Linear(2, 2), "attention", 4)
