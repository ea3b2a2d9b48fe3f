"""The distillation losses, computed on a few positions at a time.

The logits of a whole batch, B·T·V for each of two models, would need more memory than the rest of the training. So
the losses start from hidden states: logits, loss and gradient are computed for one chunk of positions after another,
and only the gradients are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 32 << 20  # float32 logits of a chunk; about five tensors of this size exist at a time
END = 1e-3  # a beta as near to 0 or 1 is taken as that: float32 would lose the divergence in its division by beta

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

    def part(self, chosen: Tensor) -> Predictions:
        """The predictions at the chosen (P,), bool, of the positions."""
        if chosen.all():
            return self
        teacher = None if self.teacher is None else self.teacher[chosen]
        return replace(self, student=self.student[chosen], teacher=teacher, targets=self.targets[chosen])

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


def terms(
    student: Tensor, teacher: Tensor | None, targets: Tensor, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(divergence, cross entropy), in nats, summed over positions; the divergence is 0 without a teacher.

    Args:
        student, teacher: (P, V), logits.
        targets: (P,).
        beta: of `divergence`.
    """
    student_logs = student.log_softmax(-1)
    entropy = -student_logs.gather(1, targets[:, None]).sum()
    if teacher is None:
        return torch.zeros_like(entropy), entropy
    return divergence(teacher.log_softmax(-1), student_logs, beta), entropy


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The divergence of log-probabilities (P, V), summed over positions.

    KL(teacher ‖ student) for beta = 0, KL(student ‖ teacher) for 1, and between them, with M = β T + (1 − β) S, the
    generalised Jensen-Shannon divergence β KL(T ‖ M) + (1 − β) KL(S ‖ M). Departures from its source, GKD (arXiv
    2306.13649): it is divided by β (1 − β), so that its limits are the two ends, and all agree to second order; and
    within END of an end it is that end.
    """
    if beta <= END:
        return _kl(teacher, student)
    if beta >= 1 - END:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return _kl(teacher, mixture) / (1 - beta) + _kl(student, mixture) / beta


def _kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(of ‖ to) of log-probabilities (P, V), summed over positions."""
    probability = of.exp()
    # Tokens with probability 0 (logit −inf) contribute 0, not NaN.
    return torch.where(probability > 0, probability * (of - to), 0.0).sum()


def _with_gradient(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: tuple[float, float], beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The `terms`, and the gradient (P, V) of their sum with `weights` to the logits `student`.

    That of KL(teacher ‖ student) is written down, in half the memory and time of autograd, which has the others.
    """
    if teacher is None or beta > END:
        with torch.enable_grad():
            logits = student.requires_grad_(True)
            distance, entropy = terms(logits, teacher, targets, beta)
            (above,) = torch.autograd.grad(weights[0] * distance + weights[1] * entropy, logits)
        return distance.detach(), entropy.detach(), above
    own, taught = student.log_softmax(-1), teacher.log_softmax(-1)
    entropy = -own.gather(1, targets[:, None]).sum()
    probability = taught.exp()
    distance = taught.sub_(own).mul_(probability).masked_fill_(probability == 0, 0.0).sum()
    above = own.exp_().mul_(sum(weights)).sub_(probability, alpha=weights[0])
    above[torch.arange(len(targets), device=targets.device), targets] -= weights[1]
    return distance, entropy, above


class _ChunkedLoss(torch.autograd.Function):
    """The weighted sum of both losses over all positions, whose gradient is computed chunk by chunk in `forward`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        predictions: Predictions,
        weights: tuple[float, float],
        beta: float,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student)
        head_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        sums = torch.zeros(2, dtype=torch.float32, device=student.device)
        for part in predictions.slices():
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_(True)
                logits, taught, targets = predictions.logits(part, hidden)
            distance, entropy, above = _with_gradient(logits.detach(), taught, targets, weights, beta)
            gradient[part], *others = torch.autograd.grad(logits, (hidden, *parameters), above)
            for total, other in zip(head_gradients, others, strict=True):
                total += other
            sums += torch.stack((distance, entropy))
        ctx.save_for_backward(gradient, *head_gradients)
        loss = weights[0] * sums[0] + weights[1] * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradient, *head_gradients = ctx.saved_tensors
        return (gradient * above[0], None, None, None, *(above[0] * total for total in head_gradients))


def chunked_loss(
    predictions: Predictions, head: nn.Module, kl: float, ce: float, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, terms): kl · KL + ce · CE, and [KL, CE] (2,), each summed over positions; only `loss` is differentiable.

    Args:
        head: the module of `predictions.student_head`, whose trainable parameters get gradients too.
        beta: which `divergence` stands for KL.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(predictions.student, predictions, (kl, ce), beta, *parameters)  # type: ignore[return-value]


def hidden_error(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖², summed over the positions in `seen`; ().

    Args:
        student, teacher: (B, T, D), hidden states.
        seen: (B, T), bool.
    """
    difference = (student - teacher).float().square().sum(-1)
    size = teacher.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference / size)[seen].sum()
