"""Layers one by one: exact layers stay, others come nearer, and later layers mend what earlier ones broke."""

from __future__ import annotations

import copy

import pytest
import torch

from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.distill import fidelity
from mhconvert.heal.layer_healing import fit_blocks
from mhconvert.heal.student import Student, Teacher, states
from mhconvert.progress import Progress, ignore
from tests.convert.conversions import donor_model
from tests.heal.models import pair, rows


def kl(student: object, teacher: object) -> float:
    found = fidelity(
        Student(student, 320), Teacher(teacher), rows(4, 32, seed=9), Fidelity, 4, torch.device("cpu")
    )
    return float(found["kl"])


@pytest.mark.parametrize("train", ["attention", "all"])
def test_layers_come_nearer_and_only_what_trains_changes(train: str) -> None:
    student, donor = pair(0.3)
    before, weights = kl(student, donor), copy.deepcopy(student.state_dict())
    events: list[Progress] = []
    fit_blocks(
        student, donor, rows(32, 32).ids, tokens=20 * 1024, train=train, seed=0, on_progress=events.append
    )
    assert [event.done for event in events] == [1, 2]
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, weights[name])}
    assert all(".layers." in name for name in changed)
    assert all(".self_attn." in name for name in changed) == (train == "attention")
    assert kl(student, donor) < 0.95 * before  # random weights, a thousand random tokens


def test_a_layer_that_equals_its_teachers_stays_as_it_is() -> None:
    donor, model = donor_model(), donor_model()
    fit_blocks(model, donor, rows(8, 32).ids, tokens=4096, train="all", seed=0, on_progress=ignore)
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_layer_mends_what_reaches_it() -> None:
    """The first layer cannot learn here; the second sees its error and works against it."""
    student, donor = pair(0.25)
    frozen = copy.deepcopy(student)
    fit_blocks(
        student, donor, rows(32, 32).ids, tokens=20 * 1024, train="attention", seed=0, on_progress=ignore
    )
    with torch.no_grad():
        student.model.layers[0].load_state_dict(frozen.model.layers[0].state_dict())

    def error(model: object) -> float:
        ours, theirs = (states(each, rows(4, 32, seed=9))[-1] for each in (model, donor))
        return ((ours - theirs).square().sum() / theirs.square().sum()).item()

    assert error(student) < error(frozen)
