"""A lean forward pass has the values and gradients of a plain one, and keeps less."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhconvert.heal.lean_forward import lean_forward
from mhconvert.heal.student import Student, Teacher, Weights, choose_trained
from tests.heal.models import pair, rows


def gradients(student: Student, teacher: Teacher, context: Any, half: bool) -> tuple[Tensor, Tensor]:
    """(loss, gradients of all trained parameters), of a step whose backward pass is outside of `context`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half), context:
        loss = student._losses(rows(3, 20, cut=(7,)), teacher, Weights(kl=1.0, ce=0.5, hidden=0.5))["loss"]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), torch.cat([each.flatten() for each in found if each is not None])


@pytest.mark.parametrize("train", ["lora", "attention", "all"])
def test_gradients_are_those_of_a_plain_pass(train: str) -> None:
    model, donor = pair()
    torch.manual_seed(0)
    student, teacher = Student(choose_trained(model, train, 4), 320), Teacher(donor)
    loss, plain = gradients(student, teacher, nullcontext(), half=False)
    lean_loss, lean = gradients(student, teacher, lean_forward(), half=False)
    assert lean_loss == loss
    assert torch.equal(lean, plain)

    half_loss, half = gradients(student, teacher, nullcontext(), half=True)
    lean_loss, lean = gradients(student, teacher, lean_forward(), half=True)
    assert lean_loss == half_loss
    # The gradients to one input are added up in bfloat16: no farther from float32 than what a plain pass gives.
    assert (lean - plain).norm() < 1.2 * (half - plain).norm()


def live() -> dict[int, int]:
    """The storages of all tensors that Python can reach, by address, in bytes."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) is Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize(("activation", "factors"), [(F.silu, 2), (F.gelu, 2), (F.mish, 3)])
def test_an_mlp_with_frozen_weights_keeps_two_factors_and_no_copy_of_a_weight(
    activation: Any, factors: int
) -> None:
    up, gate, down = torch.randn(32, 16), torch.randn(32, 16), torch.randn(16, 32)
    x = torch.randn(64, 16, requires_grad=True)
    before = live()
    with torch.autocast("cpu", torch.bfloat16), lean_forward():
        node = F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down).grad_fn
    kept = [size for address, size in live().items() if address not in before]
    assert node is not None
    assert kept == [64 * 32 * 2] * factors


def test_what_was_changed_after_it_was_made_is_not_made_again() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)

    def loss() -> Tensor:
        activated = F.silu(x)
        with torch.no_grad():
            activated.detach().mul_(2.0)
        return F.linear(activated, weight).sum()

    plain = torch.autograd.grad(loss(), weight)[0]
    with lean_forward():
        value = loss()
    assert torch.equal(torch.autograd.grad(value, weight)[0], plain)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_a_gradient_needs_must_not_be_changed_in_place(changed: str) -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    with lean_forward(), torch.autocast("cpu", torch.bfloat16):
        hidden = x * 1.0
        value = (F.silu(hidden) * F.silu(hidden)).sum() if changed == "input" else F.linear(x, weight).sum()
    with torch.no_grad():
        (hidden if changed == "input" else weight).mul_(5)
    with pytest.raises(RuntimeError, match="was changed in place"):
        value.backward()


def test_the_teacher_takes_equal_parameters_outside_attention_from_the_student() -> None:
    model, donor = pair()
    expected = donor(torch.arange(2, 12)[None]).logits
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    teacher = Teacher(donor)
    teacher.share(model)
    own = {id(parameter) for parameter in model.parameters()}
    shared = {name for name, parameter in teacher.model.named_parameters() if id(parameter) in own}
    assert "model.layers.0.mlp.up_proj.weight" in shared
    assert "model.embed_tokens.weight" in shared
    assert "model.layers.1.mlp.up_proj.weight" not in shared
    assert not any(".self_attn." in name for name in shared)
    assert torch.equal(teacher.model(torch.arange(2, 12)[None]).logits, expected)
