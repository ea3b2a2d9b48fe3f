"""The distillation losses, computed on a few positions at a time.

The logits of a whole batch, B·T·V for each of two models, would need more memory than the rest of the training. So
the losses start from hidden states: logits, loss and gradient are computed for one chunk of positions after another,
and only the gradients are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # float32 logits of a chunk; about four tensors of this size exist at a time

Head = Callable[[Tensor], Tensor]  # normed hidden states (P, D) -> logits (P, V)
Chunk = tuple[Tensor, Tensor | None, Tensor]  # logits of the student and of the teacher, targets


@dataclass(frozen=True)
class Predictions:
    """The inputs of both output heads at P positions, and the next tokens.

    Attributes:
        student: (P, D), hidden states after the final norm.
        teacher: (P, D'), the same of the teacher; None if only the text is learnt.
        targets: (P,), int64.
        student_head, teacher_head: hidden states -> logits.
        vocab_size: number of logits that both models have, without padding.
    """

    student: Tensor
    teacher: Tensor | None
    targets: Tensor
    student_head: Head
    teacher_head: Head
    vocab_size: int

    def slices(self) -> Iterator[slice]:
        """The chunks of positions whose logits are computed together."""
        size = max(1, CHUNK_BYTES // (4 * self.vocab_size))
        return (slice(begin, begin + size) for begin in range(0, len(self.targets), size))

    def logits(self, part: slice, student: Tensor) -> Chunk:
        """The float32 logits and the targets of a chunk.

        Args:
            student: hidden states of the chunk; an argument so that gradients to it can be computed.
        """
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher_head(self.teacher[part])[..., : self.vocab_size].float()
        return self.student_head(student)[..., : self.vocab_size].float(), teacher, self.targets[part]


def terms(student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(teacher ‖ student), cross entropy), in nats, summed over positions; KL is 0 without a teacher.

    Args:
        student, teacher: (P, V), logits.
        targets: (P,).
    """
    student_logs = student.log_softmax(-1)
    entropy = -student_logs.gather(1, targets[:, None]).sum()
    if teacher is None:
        return torch.zeros_like(entropy), entropy
    teacher_logs = teacher.log_softmax(-1)
    probability = teacher_logs.exp()
    # Tokens with probability 0 (logit −inf) contribute 0, not NaN.
    return torch.where(probability > 0, probability * (teacher_logs - student_logs), 0.0).sum(), entropy


class _ChunkedLoss(torch.autograd.Function):
    """The weighted sum of both losses over all positions, whose gradient is computed chunk by chunk in `forward`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, predictions: Predictions, weights: tuple[float, float], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student)
        head_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        sums = torch.zeros(2, dtype=torch.float32, device=student.device)
        for part in predictions.slices():
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_(True)
                divergence, entropy = terms(*predictions.logits(part, hidden))
                loss = weights[0] * divergence + weights[1] * entropy
                gradient[part], *others = torch.autograd.grad(loss, (hidden, *parameters))
            for total, other in zip(head_gradients, others, strict=True):
                total += other
            sums += torch.stack((divergence.detach(), entropy.detach()))
        ctx.save_for_backward(gradient, *head_gradients)
        loss = weights[0] * sums[0] + weights[1] * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradient, *head_gradients = ctx.saved_tensors
        return (gradient * above[0], None, None, *(above[0] * total for total in head_gradients))


def chunked_loss(predictions: Predictions, head: nn.Module, kl: float, ce: float) -> tuple[Tensor, Tensor]:
    """(loss, terms): kl · KL + ce · CE, and [KL, CE] (2,), each summed over positions; only `loss` is differentiable.

    Args:
        head: the module of `predictions.student_head`, whose trainable parameters get gradients too.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(predictions.student, predictions, (kl, ce), *parameters)  # type: ignore[return-value]


def hidden_error(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖², summed over the positions in `seen`; ().

    Args:
        student, teacher: (B, T, D), hidden states.
        seen: (B, T), bool.
    """
    difference = (student - teacher).float().square().sum(-1)
    size = teacher.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference / size)[seen].sum()
