"""Loss terms of student against teacher predictions, computed for a few positions at a time.

Logits of a whole batch, B·T·V of two models, are larger than everything else in training. Here hidden states come in;
a chunk of positions becomes logits, a loss and the loss's gradient at once, and only the gradients stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # of one chunk's float32 logits; some four of that size are alive

Head = Callable[[Tensor], Tensor]  # normed hidden states (P, D) -> logits (P, V)
Chunk = tuple[Tensor, Tensor | None, Tensor]  # student's logits, teacher's, targets


@dataclass(frozen=True)
class Predictions:
    """P predictions: what both models' heads read, and the tokens that follow.

    student (P, D), teacher (P, D') hidden states behind the final norm, None where the text alone is learnt;
    targets (P,) int64. vocab_size: logits that both have (some pad their vocabulary).
    """

    student: Tensor
    teacher: Tensor | None
    targets: Tensor
    student_head: Head
    teacher_head: Head
    vocab_size: int

    def slices(self) -> Iterator[slice]:
        """Return the slices of positions whose logits are in memory together."""
        size = max(1, CHUNK_BYTES // (4 * self.vocab_size))
        return (slice(begin, begin + size) for begin in range(0, len(self.targets), size))

    def logits(self, part: slice, student: Tensor) -> Chunk:
        """float32; `student` stands for the states of `part`, so that gradients can be asked for."""
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher_head(self.teacher[part])[..., : self.vocab_size].float()
        return self.student_head(student)[..., : self.vocab_size].float(), teacher, self.targets[part]


def terms(student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of KL(teacher ‖ student), 0 without one, and of −log p(target), in nats.

    Logits (P, V), targets (P,).
    """
    ours = student.log_softmax(-1)
    entropy = -ours.gather(1, targets[:, None]).sum()
    if teacher is None:
        return torch.zeros_like(entropy), entropy
    theirs = teacher.log_softmax(-1)
    probability = theirs.exp()
    # A token that the teacher rules out (-inf) adds nothing.
    return torch.where(probability > 0, probability * (theirs - ours), 0.0).sum(), entropy


class _Summed(torch.autograd.Function):
    """Sums both terms over all positions, and differentiates their weighted sum chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, found: Predictions, weights: tuple[float, float], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student)
        of_head = [torch.zeros_like(parameter) for parameter in parameters]
        sums = torch.zeros(2, dtype=torch.float32, device=student.device)
        for part in found.slices():
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_(True)
                divergence, entropy = terms(*found.logits(part, hidden))
                loss = weights[0] * divergence + weights[1] * entropy
                mine, *others = torch.autograd.grad(loss, (hidden, *parameters))
            gradient[part] = mine
            for whole, other in zip(of_head, others, strict=True):
                whole += other
            sums += torch.stack((divergence.detach(), entropy.detach()))
        ctx.save_for_backward(gradient, *of_head)
        loss = weights[0] * sums[0] + weights[1] * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradient, *of_head = ctx.saved_tensors
        return (gradient * above[0], None, None, *(above[0] * whole for whole in of_head))


def summed(found: Predictions, head: nn.Module, kl: float, ce: float) -> tuple[Tensor, Tensor]:
    """(kl · KL + ce · CE, both terms apart (2,)), summed over the positions; only the first is differentiable.

    head: the module behind `found.student_head`; its trainable parameters get their gradients too.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _Summed.apply(found.student, found, (kl, ce), *parameters)  # type: ignore[return-value]


def hidden_error(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """Sum over the positions in `seen` (B, T) of ‖student − teacher‖² / ‖teacher‖²; states (B, T, D)."""
    difference = (student - teacher).float().square().sum(-1)
    size = teacher.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference / size)[seen].sum()
