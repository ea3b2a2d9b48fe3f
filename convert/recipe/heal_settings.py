"""What a user may choose about healing: a part of a recipe, and the options of `mhconvert heal`."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mhconvert.errors import HealError

from ..validation.field_types import Also, is_number

Trained = Literal["attention", "all", "lora", "hydra"]
Schedule = Literal["cosine", "wsd", "constant"]
Tokens = Annotated[int, Also(str)]  # 20M
TRAINED = ("attention", "all", "lora", "hydra")
ROUTERS = ("fixed", "trained")
SCHEDULES = ("cosine", "wsd", "constant")
TERMS = ("kl", "ce", "hidden", "balance")
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MAY_CHANGE = (
    "lr",
    "micro_batch",
    "save_tokens",
    "device",
    "gradient_checkpointing",
)  # between a run and its resume


@dataclass(frozen=True)
class HealSettings:
    """One healing run. Numbers of tokens count every token of a packed row.

    tokens: end-to-end training, of which the last `lm_tokens` see the text alone (cross-entropy) and the others the
    teacher. layer_tokens: before that, each layer on its own, against what the teacher's layer gives.
    data: sources (files, globs, dataset names, or "self": sampled from the teacher) and their shares of the tokens.
    teacher: a donor reference; None: the donor that the checkpoint was made from. loss: weight of kl (teacher ‖
    student, nats a token), ce (the text's next token), hidden (relative squared error of hidden states) and balance (of
    the load of routed heads).
    fusion: of decoupled heads that are still to be fused, how many at most become one in this run.
    router: of routed heads, whether their choice by token stays or learns too.
    train: the tensors that change (None: lora, or attention where heads are fused). rank: of lora and hydra, whose
    adapter is merged at the end. lr: peak; None: by what trains. warmup: share of the steps. sequence_length:
    tokens a row; None: 1024, or what the model reads. batch_tokens: a step; None: by tokens. micro_batch: rows of
    one process that are in memory together. held_out: rows never trained on. epochs: how often text may be
    repeated. eval_tokens, save_tokens: between two measurements on the held-out rows, and two durable checkpoints;
    None: a tenth of the run.
    """

    tokens: Tokens = 0
    layer_tokens: Tokens = 0
    lm_tokens: Tokens = 0
    data: Annotated[dict[str, float], Also(str | list[str])] = field(default_factory=lambda: {"self": 1.0})
    teacher: str | None = None
    loss: Annotated[dict[str, float], Also(str)] = field(default_factory=lambda: {"kl": 1.0})
    fusion: int | None = None
    router: Literal["fixed", "trained"] = "fixed"
    train: Trained = None  # type: ignore[assignment]  # one of them from the start, whatever was given
    rank: int = 16
    lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    sequence_length: int | None = None
    batch_tokens: Tokens | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    held_out: int = 4
    epochs: int = 1
    eval_tokens: Tokens | None = None
    save_tokens: Tokens | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "layer_tokens", "lm_tokens", "eval_tokens", "save_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, token_count(value, name))
        if isinstance(self.data, (str, list, tuple)):
            sources = [self.data] if isinstance(self.data, str) else self.data
            object.__setattr__(self, "data", dict.fromkeys(sources, 1.0))
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", loss_terms(self.loss))
        if self.train is None:
            object.__setattr__(self, "train", "lora" if self.fusion is None else "attention")
        self._check_types()
        self._check_choices()
        self._check_numbers()

    def _check_types(self) -> None:
        """Values as YAML gives them: `3e-4` is text there."""
        for place in ("data", "loss"):
            if not isinstance(getattr(self, place), dict):
                raise HealError(f"{place}: {getattr(self, place)} is not a mapping of names to weights")
        for name in ("lr", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, str):
                with suppress(ValueError):
                    value = float(value)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise HealError(f"{name}={value!r} is not a number")
            object.__setattr__(self, name, value)
        for name in ("rank", "held_out", "epochs", "micro_batch", "sequence_length", "seed", "fusion"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise HealError(f"{name}={value!r} is not a whole number")
        if not isinstance(self.gradient_checkpointing, bool):
            raise HealError(
                f"gradient_checkpointing={self.gradient_checkpointing!r} is neither true nor false"
            )

    def _check_choices(self) -> None:
        if not self.tokens and not self.layer_tokens:
            raise HealError("there is nothing to do; say how many tokens to heal on, for example 20M")
        if self.fusion is not None and (self.train not in ("attention", "all") or not self.tokens):
            raise HealError("fusion trains the heads themselves: use --tokens, and --train attention or all")
        if self.lm_tokens > self.tokens:
            raise HealError(f"lm_tokens={self.lm_tokens} are a part of tokens={self.tokens}; choose fewer")
        if not self.data:
            raise HealError("healing needs text; name files, a dataset, or self")
        for name, known in (("train", TRAINED), ("schedule", SCHEDULES), ("router", ROUTERS)):
            if getattr(self, name) not in known:
                raise HealError(f"{name} '{getattr(self, name)}' is not one of {', '.join(known)}")
        for term in self.loss:
            if term not in TERMS:
                raise HealError(f"loss has no term '{term}'; it has {', '.join(TERMS)}")
        if self.loss.get("balance") and self.router == "fixed":
            raise HealError(
                "a fixed router does not learn to balance its load; use --router trained, or no balance"
            )
        for place, shares in (("loss", self.loss), ("data", self.data)):
            for name, share in shares.items():
                if not is_number(share) or share < 0:
                    raise HealError(f"{place} {name}={share} is not a weight; use a number from 0")
            if not sum(share for name, share in shares.items() if name != "balance") > 0:
                raise HealError(f"every weight of {place} is 0; one of them has to count")

    def _check_numbers(self) -> None:
        for name, least in (
            ("held_out", 1),
            ("epochs", 1),
            ("rank", 1),
            ("micro_batch", 1),
            ("fusion", 2),
            ("sequence_length", 8),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise HealError(f"{name}={value} is too small; use at least {least}")
        if self.lr is not None and not 0 < self.lr < 1:
            raise HealError(f"lr={self.lr} is not between 0 and 1")
        if not 0 <= self.warmup < 1:
            raise HealError(f"warmup={self.warmup} is a share of the steps; use one from 0 and below 1")
        if not 0 <= self.weight_decay < 1 or not self.clip > 0:
            raise HealError(
                f"weight_decay={self.weight_decay} and clip={self.clip}: use one in [0, 1) and one above 0"
            )
        if not 0 <= self.seed < 2**32:
            raise HealError(f"seed={self.seed} is not between 0 and {2**32 - 1}")

    def same_run(self, other: dict[str, Any]) -> str | None:
        """The first setting that a resumed run may not change and that differs from `other`, as JSON gave it back."""
        for name, value in vars(self).items():
            if name not in MAY_CHANGE and other.get(name) != value:
                return name
        return None


def token_count(value: int | str, name: str = "tokens") -> int:
    """20_000_000 from 20000000, "20M" or "20e6"; "200k", "1.5B". Raises HealError for what is no number of tokens."""
    if isinstance(value, bool):
        raise HealError(f"{name}={value} is not a number of tokens such as 200k or 20M")
    if isinstance(value, int):
        count: float = value
    else:
        match = re.fullmatch(
            r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmb]?)\s*", str(value).lower().replace("_", "")
        )
        if match is None:
            raise HealError(f"{name} '{value}' is not a number of tokens such as 200k or 20M")
        count = float(match[1]) * FACTORS[match[2]]
    if count < 0 or count != int(count):
        raise HealError(f"{name}={value} is not a whole number of tokens")
    return int(count)


def loss_terms(text: str) -> dict[str, float]:
    """{"kl": 1.0, "ce": 0.1} from "kl=1,ce=0.1"; a term without a weight has 1. Raises HealError."""
    return {name: 1.0 if weight is None else weight for name, weight in map(weighted, text.split(","))}


def weighted(text: str) -> tuple[str, float | None]:
    """("books.txt", 2.0) from "books.txt=2"; None where no weight is given."""
    name, equals, weight = text.strip().rpartition("=")
    try:
        return (name, float(weight)) if equals else (text.strip(), None)
    except ValueError:
        return text.strip(), None
