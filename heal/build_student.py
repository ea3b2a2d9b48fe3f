"""Builds the student of a healing run for the kind of its model."""

from __future__ import annotations

from typing import Any

import torch

from ..convert.recipe.heal_settings import HealSettings
from . import fusion
from .routing import RoutingStudent
from .student import Student, choose_trained


def build_student(model: Any, settings: HealSettings, vocab_size: int, *, is_adapter: bool) -> Student:
    """The student for `model`, with gradients for the parameters that the settings train.

    Args:
        vocab_size: number of logits that student and teacher both have.
        is_adapter: whether `model` is an existing adapter, whose trainable parameters are set already.
    """
    if is_adapter:
        return Student(model, vocab_size)
    torch.manual_seed(settings.seed)  # for the initialisation of a new adapter
    if settings.fusion:
        fusion.prepare(model, settings.fusion)
        return fusion.FusingStudent(choose_trained(model, settings.train, settings.rank), vocab_size)
    if hasattr(model, "load_balance"):
        return RoutingStudent.of(model, settings, vocab_size)
    return Student(choose_trained(model, settings.train, settings.rank), vocab_size)
