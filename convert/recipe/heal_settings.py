"""What a user may choose about healing: a part of a recipe, and the options of `mhconvert heal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal

from mhconvert.errors import HealError

from ..validation.option import Names, Option, Takes, default
from ..validation.settings import Settings
from .token_count import token_count as token_count
from .weighted_names import alike, loss_terms, require_terms

Trained = Literal["attention", "all", "lora", "hydra"]
Schedule = Literal["cosine", "wsd", "constant"]
Router = Literal["fixed", "trained"]
A_TENTH = "a tenth of tokens"
BETA = 0.5  # of the loss on text that the student writes
SEED = Option(
    "Seed of every random choice.", "N", ge=0, lt=2**32, range_hint="is not between 0 and 4294967295"
)
# Between a run and its resume.
MAY_CHANGE = ("skip_bad", "lr", "micro_batch", "save_tokens", "device", "gradient_checkpointing")


def _tokens(help: str, name: str, default: str = "", least: int = 0) -> Option:
    """Return the option of a number of tokens, `least` or more, which may also be written as 20M."""
    return Option(
        help,
        "N",
        ge=least,
        range_hint=None if least else "is not a number of tokens such as 200k or 20M",
        parse=lambda text: token_count(text, name),
        also=str,
        default=default,
    )


@dataclass(frozen=True)
class HealSettings(Settings):
    """One healing run: how much text, which text, what trains and how. Token counts include every token of a row."""

    fault = HealError

    tokens: Annotated[
        Takes[int, int | str], _tokens("Tokens of end-to-end training: 200k, 20M, 1.5B.", "tokens")
    ] = default(0)
    layer_tokens: Annotated[
        Takes[int, int | str],
        _tokens(
            "Before that: tokens on which each layer learns on its own, against the teacher's layer.",
            "layer_tokens",
        ),
    ] = default(0)
    lm_tokens: Annotated[
        Takes[int, int | str],
        _tokens(
            "Of tokens, the last ones that teach the text alone (cross-entropy), without the teacher.",
            "lm_tokens",
        ),
    ] = default(0)
    data: Annotated[
        Takes[dict[str, float], Names | Mapping[str, float]],
        Option(
            "Text (files, quoted globs, a dataset's name, or self: sampled from the teacher) and its share of the "
            "tokens; may be repeated.",
            "SOURCE[=SHARE]",
            parse=alike,
            also=str | Sequence[str],
            repeat=True,
        ),
    ] = default(field(default_factory=lambda: {"self": 1.0}))
    skip_bad: Annotated[
        bool,
        Option(
            "Skip and count records without text, and conversations that the chat template refuses; otherwise they are "
            "errors."
        ),
    ] = False
    teacher: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("Model of the same tokenizer to learn from.", "DONOR", default="the donor of the checkpoint"),
    ] = default(None)
    on_policy: Annotated[
        float | None,
        Option(
            "Share of the rows that the student writes while it trains, each after the first words of a text; the "
            "teacher scores them.",
            "SHARE",
            gt=0,
            lt=1,
            range_hint="is not between 0 and 1: the other rows are the text",
            default="none",
        ),
    ] = None
    on_policy_loss: Annotated[
        float | None,
        Option(
            "What kl is on those rows. 0: KL(teacher ‖ student). 1: KL(student ‖ teacher). Between them: the "
            "generalised Jensen-Shannon divergence.",
            "BETA",
            ge=0,
            le=1,
            default=f"{BETA:g}",
        ),
    ] = None  # `check` decides it
    loss: Annotated[
        Takes[dict[str, float], str | Mapping[str, float]],
        Option(
            "Weights of the terms. kl: KL(teacher ‖ student), nats a token. ce: cross-entropy of the text. hidden: "
            "relative squared error of the hidden states behind each layer. balance: load of routed heads, see router.",
            "TERM[=W],…",
            parse=loss_terms,
            also=str,
        ),
    ] = default(field(default_factory=lambda: {"kl": 1.0}))
    fusion: Annotated[
        int | None,
        Option(
            "Of a dha checkpoint with --fusion trained: train its heads to be one, up to N together; 2, then 4, "
            "then 8.",
            "N",
            ge=2,
        ),
    ] = None
    router: Annotated[
        Router,
        Option(
            "Of a moh checkpoint: whether what chooses heads learns too (loss term balance, of their load)."
        ),
    ] = "fixed"
    train: Annotated[
        Takes[Trained, Trained | None],
        Option(
            "What changes; lora and hydra: an adapter on the attention, merged at the end.",
            default="lora; attention where heads are fused",
        ),
    ] = default(None)  # `check` decides it
    rank: Annotated[int, Option("Rank of lora and hydra.", "N", ge=1)] = 16
    lr: Annotated[
        float | None,
        Option(
            "Peak learning rate.",
            "RATE",
            gt=0,
            lt=1,
            range_hint="is not between 0 and 1",
            default="by what trains",
        ),
    ] = None
    schedule: Annotated[Schedule, Option("Schedule of the learning rate; wsd: warm-up, stable, decay.")] = (
        "cosine"
    )
    warmup: Annotated[
        float,
        Option(
            "Share of the steps in which the learning rate rises.",
            "SHARE",
            ge=0,
            lt=1,
            range_hint="is a share of the steps; use one from 0 and below 1",
        ),
    ] = 0.1
    weight_decay: Annotated[
        float, Option("Decay of matrices; norms and biases never decay.", "W", ge=0, lt=1)
    ] = 0.0
    clip: Annotated[float, Option("Largest norm of the gradient.", "NORM", gt=0, le=1e30)] = 1.0
    sequence_length: Annotated[
        int | None, Option("Tokens a row.", "N", ge=8, default="1024, or what the model reads")
    ] = None
    batch_tokens: Annotated[
        Takes[int | None, int | str | None],
        _tokens("Tokens a step of all processes.", "batch_tokens", "tokens / 200, from 1k to 64k", 1),
    ] = default(None)
    micro_batch: Annotated[
        int | None,
        Option("Rows of one process in memory together.", "ROWS", ge=1, default="2 on a CPU, 8 on a GPU"),
    ] = None
    gradient_checkpointing: Annotated[bool, Option("Less memory, a third more time.")] = False
    held_out: Annotated[
        int, Option("Rows that are never trained on; what is measured is measured there.", "ROWS", ge=1)
    ] = 4
    epochs: Annotated[int, Option("How often text may be read, if it is short.", "N", ge=1)] = 1
    eval_tokens: Annotated[
        Takes[int | None, int | str | None],
        _tokens("Tokens between two measurements on the held-out rows.", "eval_tokens", A_TENTH, 1),
    ] = default(None)
    save_tokens: Annotated[
        Takes[int | None, int | str | None],
        _tokens("Tokens between two durable checkpoints.", "save_tokens", A_TENTH, 1),
    ] = default(None)
    seed: Annotated[int, SEED] = 0
    device: Annotated[
        str | None,
        Option("CUDA_VISIBLE_DEVICES chooses among GPUs.", default="CUDA if present", words=("cpu", "cuda")),
    ] = None

    def check(self) -> None:
        """Raise HealError for settings that do not go together."""
        if self.device not in (None, "cpu", "cuda"):
            what = f"device '{self.device}' is neither cpu nor cuda"
            raise HealError(f"{what}; CUDA_VISIBLE_DEVICES chooses among GPUs")
        if self.train is None:
            self._set("train", "lora" if self.fusion is None else "attention")
        if not self.tokens and not self.layer_tokens:
            raise HealError("there is nothing to do; say how many tokens to heal on, for example 20M")
        if self.fusion is not None and (self.train not in ("attention", "all") or not self.tokens):
            raise HealError("fusion trains the heads themselves: use --tokens, and --train attention or all")
        if self.lm_tokens > self.tokens:
            raise HealError(f"lm_tokens={self.lm_tokens} are a part of tokens={self.tokens}; choose fewer")
        if not self.data:
            raise HealError("healing needs text; name files, a dataset, or self")
        require_terms(self.loss)
        self._check_on_policy()
        if self.loss.get("balance") and self.router == "fixed":
            raise HealError(
                "a fixed router does not learn to balance its load; use --router trained, or no balance"
            )
        for place, shares in (("loss", self.loss), ("data", self.data)):
            for name, share in shares.items():
                if not 0 <= share < float("inf"):
                    raise HealError(f"{place} {name}={share:g} is not a weight; use a number from 0")
            if not sum(share for name, share in shares.items() if name != "balance") > 0:
                raise HealError(f"every weight of {place} is 0; one of them has to count")

    def _check_on_policy(self) -> None:
        """Raise HealError for settings of the student's own text that do not go together."""
        if self.on_policy is None:
            if self.on_policy_loss is not None:
                raise HealError(
                    "on_policy_loss is of rows that the student writes; say how many with on_policy"
                )
            return
        if self.on_policy_loss is None:
            self._set("on_policy_loss", BETA)
        if not self.loss.get("kl") or self.lm_tokens >= self.tokens:
            raise HealError(
                "on_policy text is scored by the teacher: give the loss's kl a weight, and leave it tokens that are "
                "not lm_tokens"
            )

    def same_run(self, other: dict[str, Any]) -> str | None:
        """Return the first setting that differs from `other` (from JSON) though a resume may not change it, or None."""
        for name, value in vars(self).items():
            if name not in MAY_CHANGE and other.get(name) != value:
                return name
        return None
