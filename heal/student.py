"""The student, its teacher, and which of the student's tensors train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.errors import HealError

from ..convert.donor.donor import final_logits
from ..convert.recipe.heal_settings import HealSettings
from .layer_fit import tensor_scale
from .losses import Predictions, hidden_error, summed
from .packed_rows import Rows

# Peak learning rates by what trains; for attention and all of each tensor's RMS.
LEARNING_RATES = {"attention": 3e-4, "all": 1e-4, "lora": 1e-3, "hydra": 1e-3}
SCORES = ".router.score."  # of routed heads: what chooses
OMEGA_RATE = 1e-2  # of what mixes heads (DHA, arXiv 2406.06567, section 4.1)


@dataclass(frozen=True)
class Weights:
    """The weights of the loss terms."""

    kl: float = 0.0
    ce: float = 0.0
    hidden: float = 0.0
    balance: float = 0.0

    @property
    def taught(self) -> bool:
        """Whether any term needs the teacher."""
        return self.kl > 0 or self.hidden > 0


class Student(nn.Module):
    """A causal language model whose forward pass ends in a loss, so that a wrapper sees all of it in one call."""

    def __init__(self, model: Any, vocab_size: int):
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self._no_split_modules = model._no_split_modules  # where accelerate divides it between processes

    def forward(
        self, rows: Rows, teacher: Teacher, weights: Weights, measure: Any = None
    ) -> dict[str, Tensor]:
        """Sums over the predictions of `rows` (B, T): loss (differentiable), kl, ce, hidden, balance; and their count.

        measure: adds the predictions, in float32, to this accumulator of fidelity instead.
        """
        if measure is not None:
            with torch.no_grad(), torch.autocast(rows.ids.device.type, enabled=False):
                self._measure(rows, teacher, measure)
            return {}
        every_layer = weights.hidden > 0
        seen = states(self.model, rows, every_layer)
        balance = self.balance(weights)
        theirs = teacher.states(rows, every_layer) if weights.taught else []
        found = self._predictions(rows, seen[-1], teacher, theirs[-1] if theirs else None)
        loss, sums = summed(found, self.model.get_output_embeddings(), weights.kl, weights.ce)
        error = torch.zeros_like(loss)
        if every_layer:
            predicting = torch.nn.functional.pad(rows.predicted(), (0, 1))
            between = zip(seen[:-1], theirs[:-1], strict=True)
            errors = [hidden_error(ours, expected, predicting) for ours, expected in between]
            error = torch.stack(errors).mean() if errors else error  # a model of one layer has none
            loss = loss + weights.hidden * error
        count = torch.tensor(float(len(found.targets)), device=loss.device)
        terms = {"kl": sums[0], "ce": sums[1], "hidden": error.detach(), "balance": torch.zeros_like(count)}
        if balance is not None:
            loss = loss + weights.balance * balance * count
            terms["balance"] = balance.detach() * count
        return {"loss": loss, **terms, "count": count}

    def balance(self, weights: Weights) -> Tensor | None:
        """Return how unequal the load of routed heads is, a mean over tokens; None where it is not in the loss."""
        return None

    def end_step(self, done: float) -> dict[str, Any]:
        """Called after each optimiser step with the share of the run that is done; returns metrics to record."""
        return {}

    def _predictions(self, rows: Rows, ours: Tensor, teacher: Teacher, theirs: Tensor | None) -> Predictions:
        chosen = rows.predicted()
        return Predictions(
            student=ours[:, :-1][chosen],
            teacher=None if theirs is None else theirs[:, :-1][chosen],
            targets=rows.ids[:, 1:][chosen].long(),
            student_head=self.logits,
            teacher_head=teacher.logits,
            vocab_size=self.vocab_size,
        )

    def _measure(self, rows: Rows, teacher: Teacher, measure: Any) -> None:
        ours, theirs = states(self.model, rows)[-1], teacher.states(rows)[-1]
        found = self._predictions(rows, ours, teacher, theirs)
        for part in found.slices():
            candidate, reference, targets = found.logits(part, found.student[part])
            measure.add(reference, candidate, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed states (P, D) -> logits (P, V)."""
        return final_logits(self.model.config, self.model.get_output_embeddings()(hidden))


class Teacher:
    """A model that is only read; it is not a submodule of the student, so it is neither trained, wrapped nor saved."""

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, rows: Rows, every_layer: bool = False) -> list[Tensor]:
        return states(self.model, rows, every_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return final_logits(self.model.config, head(hidden.to(head.weight.dtype)))


def states(model: Any, rows: Rows, every_layer: bool = False) -> list[Tensor]:
    """Return hidden states (B, T, D): last those behind the final norm; with `every_layer` also each layer's output."""
    whole = not bool(
        (rows.positions[:, 1:] == 0).any()
    )  # no text begins inside a row: the plain causal mask will do
    output = model.get_decoder()(
        input_ids=rows.ids.long(),
        position_ids=None if whole else rows.positions.long(),
        use_cache=False,
        output_hidden_states=every_layer,
    )
    return [*(output.hidden_states[1:-1] if every_layer else ()), output.last_hidden_state]


def choose_trained(model: Any, train: str, rank: int, held: str | None = None) -> Any:
    """`model`, or an adapter on it, of which exactly the tensors that `train` names require gradients.

    held: a part of the names of those that stay as they are nevertheless.
    """
    for name, parameter in model.named_parameters():
        chosen = train == "all" or (train == "attention" and ".self_attn." in name)
        parameter.requires_grad_(chosen and not (held and held in name))
    if train in ("lora", "hydra"):
        model = _with_adapter(model, train, rank, held)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HealError(f"the model has no tensor that train={train} would change")
    return model


def parameter_groups(model: nn.Module, settings: HealSettings) -> list[dict[str, Any]]:
    """One group a tensor, with its peak learning rate. Matrices decay; norms and biases do not.

    A new adapter's matrices are of one size, so one rate does. Tensors that are there already differ by factors of
    hundreds: a step is a share of the tensor's RMS.
    """
    rate = settings.lr or LEARNING_RATES[settings.train]
    own = settings.train in ("attention", "all")
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        mixes = name.endswith(".omega")  # of heads that are to be one
        scale = 1.0 if mixes or not own else tensor_scale(parameter)
        if own and ".router." in name and SCORES not in name:
            scale = (
                parameter.shape[-1] ** -0.5
            )  # gates of routed heads begin at zero; as large as new maps are
        decay = settings.weight_decay if parameter.dim() > 1 and not mixes else 0.0
        groups.append(
            {
                "params": [parameter],
                "lr": (OMEGA_RATE if mixes else rate) * scale,
                "weight_decay": decay,
            }
        )
    return groups


def _with_adapter(model: Any, kind: str, rank: int, held: str | None) -> Any:
    """A LoRA of `rank`, or a Hydra of two branches of half of it, on every linear map of the attention."""
    from peft import LoraConfig, get_peft_model

    from ..convert.methods.hydra import HydraConfig

    targets = sorted(
        name
        for name, module in model.named_modules()
        if ".self_attn." in name and isinstance(module, nn.Linear) and not (held and held in f"{name}.")
    )
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return get_peft_model(model, HydraConfig(target_modules=targets, r_par=rank - rank // 2, r_seq=rank // 2))
