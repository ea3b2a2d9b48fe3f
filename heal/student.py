"""The student and the teacher of a healing run, and the student's trainable parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.errors import HealError

from ..convert.donor.whole_model import final_logits
from ..convert.recipe.heal_settings import HealSettings
from .layer_fit import tensor_scale
from .lean_forward import lean_forward
from .losses import Predictions, chunked_loss, hidden_error
from .packed_rows import Rows

# train -> peak learning rate; for "attention" and "all" as a fraction of the RMS of each tensor.
LEARNING_RATES = {"attention": 3e-4, "all": 1e-4, "lora": 1e-3, "hydra": 1e-3}
SCORES = ".router.score."  # in the names of the parameters that select routed heads
OMEGA_RATE = (
    1e-2  # learning rate of the mixing coefficients of heads; source: DHA, arXiv 2406.06567, section 4.1
)


@dataclass(frozen=True)
class Weights:
    """The weights of the loss terms."""

    kl: float = 0.0
    ce: float = 0.0
    hidden: float = 0.0
    balance: float = 0.0
    beta: float = 0.0  # of the divergence that stands for KL on rows that the student wrote

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss term needs the teacher."""
        return self.kl > 0 or self.hidden > 0


class Student(nn.Module):
    """A causal language model whose forward pass returns the losses, as DDP and FSDP need one call per step."""

    def __init__(self, model: Any, vocab_size: int):
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self._no_split_modules = model._no_split_modules  # for FSDP

    def forward(
        self, rows: Rows, teacher: Teacher, weights: Weights, measure: Any = None
    ) -> dict[str, Tensor]:
        """The losses of `rows` (B, T), summed over the predictions, and the number of these.

        Args:
            measure: an accumulator of fidelity. If given, the float32 predictions are added to it and {} is returned.

        Returns loss (differentiable), kl and ce of the text, own (the divergence of rows that the student wrote) and
        own_count, hidden, balance (each for the record) and count.
        """
        if measure is not None:
            with torch.no_grad(), torch.autocast(rows.ids.device.type, enabled=False):
                self._measure(rows, teacher, measure)
            return {}
        with lean_forward():
            return self._losses(rows, teacher, weights)

    def _losses(self, rows: Rows, teacher: Teacher, weights: Weights) -> dict[str, Tensor]:
        every_layer = weights.hidden > 0
        own = states(self.model, rows, every_layer)
        balance = self.balance(weights)
        taught = teacher.states(rows, every_layer) if weights.needs_teacher else []
        predictions = self._predictions(rows, own[-1], teacher, taught[-1] if taught else None)
        loss, terms = self._prediction_losses(rows, predictions, weights)
        error = torch.zeros_like(loss)
        if every_layer:
            predicting = torch.nn.functional.pad(rows.predicted(), (0, 1))
            layers = zip(own[:-1], taught[:-1], strict=True)
            errors = [hidden_error(output, expected, predicting) for output, expected in layers]
            error = torch.stack(errors).mean() if errors else error  # empty for a model of one layer
            loss = loss + weights.hidden * error
        count = torch.tensor(float(len(predictions.targets)), device=loss.device)
        terms |= {"hidden": error.detach(), "balance": torch.zeros_like(count)}
        if balance is not None:
            loss = loss + weights.balance * balance * count
            terms["balance"] = balance.detach() * count
        return {"loss": loss, **terms, "count": count}

    def _prediction_losses(
        self, rows: Rows, predictions: Predictions, weights: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses of the predictions, and kl, ce, own and own_count; own text has no cross-entropy."""
        head = self.model.get_output_embeddings()
        own = torch.zeros_like(predictions.targets, dtype=torch.bool)
        if rows.by_student is not None:
            own = rows.by_student[:, None].expand(rows.predicted().shape)[rows.predicted()]
        loss, of_text = chunked_loss(predictions.part(~own), head, weights.kl, weights.ce)
        of_own = torch.zeros_like(of_text)
        if own.any():
            more, of_own = chunked_loss(predictions.part(own), head, weights.kl, 0.0, weights.beta)
            loss = loss + more
        return loss, {"kl": of_text[0], "ce": of_text[1], "own": of_own[0], "own_count": own.sum().float()}

    def balance(self, weights: Weights) -> Tensor | None:
        """The load-balance loss of routed heads, mean over tokens; None if it is not part of the loss."""
        return None

    def end_step(self, done: float) -> dict[str, Any]:
        """Called after each optimiser step; returns metrics to record.

        Args:
            done: fraction of the run that is done.
        """
        return {}

    def _predictions(self, rows: Rows, own: Tensor, teacher: Teacher, taught: Tensor | None) -> Predictions:
        """The predictions of both models, from the hidden states (B, T, D) of the student and of the teacher."""
        predicted = rows.predicted()
        return Predictions(
            student=own[:, :-1][predicted],
            teacher=None if taught is None else taught[:, :-1][predicted],
            targets=rows.ids[:, 1:][predicted].long(),
            student_head=self.logits,
            teacher_head=teacher.logits,
            vocab_size=self.vocab_size,
        )

    def _measure(self, rows: Rows, teacher: Teacher, measure: Any) -> None:
        own, taught = states(self.model, rows)[-1], teacher.states(rows)[-1]
        predictions = self._predictions(rows, own, teacher, taught)
        for part in predictions.slices():
            candidate, reference, targets = predictions.logits(part, predictions.student[part])
            measure.add(reference, candidate, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (P, V) for hidden states (P, D) after the final norm."""
        return final_logits(self.model.config, self.model.get_output_embeddings()(hidden))


class Teacher:
    """A model in eval mode without gradients. It is not a submodule of the student, so it is not wrapped or saved."""

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)

    def share(self, student: Any) -> None:
        """Take from `student` the parameters outside attention that are equal, so that both have them in memory once.

        For a student whose attention alone is trained or merged.
        """
        own = dict(student.named_parameters(remove_duplicate=False))
        for name, taught in list(self.model.named_parameters(remove_duplicate=False)):
            other = own.get(name)
            same = other is not None and other.dtype == taught.dtype and torch.equal(other, taught)
            if same and ".self_attn." not in name:
                module, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(module), last, other)

    @torch.no_grad()
    def states(self, rows: Rows, every_layer: bool = False) -> list[Tensor]:
        return states(self.model, rows, every_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return final_logits(self.model.config, head(hidden.to(head.weight.dtype)))


def states(model: Any, rows: Rows, every_layer: bool = False) -> list[Tensor]:
    """The hidden states (B, T, D) after the final norm, last in the list.

    With `every_layer` the outputs of all layers but the last one come before them.
    """
    # Without a document boundary inside a row the plain causal mask is right.
    whole = not bool((rows.positions[:, 1:] == 0).any())
    output = model.get_decoder()(
        input_ids=rows.ids.long(),
        position_ids=None if whole else rows.positions.long(),
        use_cache=False,
        output_hidden_states=every_layer,
    )
    return [*(output.hidden_states[1:-1] if every_layer else ()), output.last_hidden_state]


def choose_trained(model: Any, train: str, rank: int, frozen: str | None = None) -> Any:
    """`model`, or a new adapter on it, with gradients for exactly the parameters that `train` selects.

    Args:
        train: "all", "attention", "lora" or "hydra".
        rank: of a new adapter.
        frozen: parameters with this in their names are not trained.

    Raises:
        HealError: no parameter would be trained.
    """
    for name, parameter in model.named_parameters():
        chosen = train == "all" or (train == "attention" and ".self_attn." in name)
        parameter.requires_grad_(chosen and not (frozen and frozen in name))
    if train in ("lora", "hydra"):
        model = _with_adapter(model, train, rank, frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HealError(f"the model has no tensor that train={train} would change")
    return model


def parameter_groups(model: nn.Module, settings: HealSettings) -> list[dict[str, Any]]:
    """One optimiser group per trained tensor, with its peak learning rate and weight decay.

    The matrices of a new adapter are of similar size and share one rate. Existing tensors differ in size by factors
    of hundreds, so their rates are proportional to their RMS. Norms and biases have no weight decay.
    """
    rate = settings.lr or LEARNING_RATES[settings.train]
    existing = settings.train in ("attention", "all")
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        mixes = name.endswith(".omega")  # coefficients of heads that are being fused
        scale = 1.0 if mixes or not existing else tensor_scale(parameter)
        if existing and ".router." in name and SCORES not in name:
            scale = (
                parameter.shape[-1] ** -0.5
            )  # gates of routed heads start at 0: the scale of a new linear map
        decay = settings.weight_decay if parameter.dim() > 1 and not mixes else 0.0
        groups.append(
            {
                "params": [parameter],
                "lr": (OMEGA_RATE if mixes else rate) * scale,
                "weight_decay": decay,
            }
        )
    return groups


def _with_adapter(model: Any, kind: str, rank: int, frozen: str | None) -> Any:
    """`model` with a LoRA of `rank`, or a Hydra with two branches of half of it, on every linear map of attention."""
    from peft import LoraConfig, get_peft_model

    from ..convert.methods.hydra import HydraConfig

    targets = sorted(
        name
        for name, module in model.named_modules()
        if ".self_attn." in name and isinstance(module, nn.Linear) and not (frozen and frozen in f"{name}.")
    )
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return get_peft_model(model, HydraConfig(target_modules=targets, r_par=rank - rank // 2, r_seq=rank // 2))
