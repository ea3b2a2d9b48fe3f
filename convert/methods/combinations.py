"""Which method may follow which on a checkpoint: one table, asked before anything is read.

A pair has a row by the kinds of its steps. A chain is allowed where every earlier step may be followed by every later
one. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .registry import METHODS

CODED = "mla (coded)"  # mla whose latents have codes; "mla": of 16-bit elements
LATENTS = ("mla", CODED)
SWA_FIRST = "swa (first)"  # swa with the first tokens beside the window, in a class of mhconvert; "swa": in a stock one
SWA_SINKS = (
    "swa with sinks"  # learnt ones, in the class granite_swa; what such a step may follow is as of "swa"
)
WINDOWED = ("swa", SWA_FIRST)
# (method, begin of a model_type) -> the kind of what is held in such a class
OWN_CLASS = {("mla", "mla_coded"): CODED, ("swa", "swa_"): SWA_FIRST, ("swa", "granite_swa"): SWA_SINKS}
KINDS = (*WINDOWED, "dha", "mla", CODED, "mla+swa", "hybrid", "moh", "hydra")
FIRSTS = ("swa", SWA_SINKS, *KINDS[1:])


@dataclass(frozen=True)
class Pair:
    """What becomes of a `first` that a `then` follows.

    Attributes:
        exact: what of the result is exactly what; None where the pair is refused.
        refused: why, and which folder or order to take instead.
    """

    firsts: tuple[str, ...]
    thens: tuple[str, ...]
    exact: str | None = None
    refused: str = ""


BOTH_WINDOWS = "both decide which layers have windows; convert the donor that the first began with"
BOTH_KV = "both rewrite keys and values; convert the donor that the first began with"
TABLE = (
    Pair(
        ("swa",),
        ("mla", CODED, "dha", "moh"),
        "windows stay as they are; where the second keeps everything, the checkpoint",
    ),
    Pair(
        (SWA_FIRST,),
        ("mla", CODED, "dha", "moh"),
        refused="its class, with the first tokens beside the window, is read by no other conversion; convert the "
        "donor with --to swa --sinks none, and then that, or the donor that the first began with",
    ),
    Pair(
        (SWA_SINKS,),
        ("mla", CODED, "dha", "moh"),
        refused="its softmax has learned sinks, which no other conversion has; convert the donor with --to swa "
        "--sinks none, and then that",
    ),
    Pair(
        ("dha", *LATENTS),
        (SWA_FIRST,),
        refused="no class has both; take --to mla+swa, whose windows have the first tokens beside them, on the donor "
        "that the first began with",
    ),
    Pair(
        ("dha", "mla"), ("moh",), "with all heads active, the checkpoint to the bit; the cache stays as small"
    ),
    Pair(
        FIRSTS[:-1],
        ("hydra",),
        "a new adapter changes nothing; merged, it computes what it did beside its base",
    ),
    Pair(("dha", *LATENTS, "mla+swa", "hybrid"), ("dha", *LATENTS, "mla+swa", "hybrid"), refused=BOTH_KV),
    Pair(
        (*WINDOWED, SWA_SINKS),
        ("hybrid",),
        refused="a layer is windowed or linear; convert the donor that the first began with",
    ),
    Pair(
        ("hybrid",),
        WINDOWED,
        refused="no class of transformers has latents, states and windows; convert the donor that the first began with",
    ),
    Pair(
        ("hybrid",),
        ("moh",),
        refused="a linear layer has no heads to leave out, and codes are decoded once for all; convert the donor that "
        "the first began with",
    ),
    Pair(
        (*WINDOWED, SWA_SINKS),
        ("mla+swa", *WINDOWED),
        refused=BOTH_WINDOWS,
    ),
    Pair(
        LATENTS,
        ("swa",),
        refused="no class of transformers has latents and windows; take the other order, swa and then mla, or one "
        "conversion --to mla+swa",
    ),
    Pair(
        ("mla+swa",),
        WINDOWED,
        refused=BOTH_WINDOWS,
    ),
    Pair(
        ("dha",),
        ("swa",),
        refused="no class of transformers has decoupled heads and windows; take the other order, swa and then dha",
    ),
    Pair(
        (CODED, "mla+swa"),
        ("moh",),
        refused="codes are decoded once for all heads, so a head that is left out saves nothing; take latents of "
        "16-bit elements: --to mla --kv-bits 16, and then moh",
    ),
    Pair(
        ("moh",),
        ("mla", CODED, "dha", "mla+swa", *WINDOWED, "hybrid"),
        refused="routers choose among heads as they were fitted to them; take the other order, moh last",
    ),
    Pair(("moh",), ("moh",), refused="both choose the heads of a token; convert what the first began with"),
    Pair(
        ("hydra",),
        KINDS,
        refused="an adapter lies beside a model and comes last; mhconvert merge ADAPTER makes a model, and that may "
        "be converted",
    ),
)


def pair(first: str, then: str) -> Pair:
    """The row for a step of kind `first` that one of kind `then` follows; one that refuses where the table has none."""
    for row in TABLE:
        if first in row.firsts and then in row.thens:
            return row
    return Pair(
        (first,),
        (then,),
        refused="nothing is known of the two together; convert the donor that the first began with",
    )


def kind(method: str, settings: Any = None) -> str:
    """The kind of a step by its method and settings."""
    if method == "swa" and getattr(settings, "sinks", None) == "first":
        return SWA_FIRST
    return CODED if method == "mla" and getattr(settings, "coded", False) else method


def held_kind(method: str, model_type: str) -> str:
    """The kind of an earlier step by its method and the class that holds the result."""
    kinds = (
        kind for (made, begin), kind in OWN_CLASS.items() if made == method and model_type.startswith(begin)
    )
    return next(kinds, method)


def refusal(steps: Iterable[str], then: str) -> str | None:
    """Why a step of kind `then` cannot follow steps of these kinds, the first that it cannot follow; None: it can."""
    for first in steps:
        row = pair(first, then)
        if row.exact is None:
            return f"{then} cannot follow {first}: {row.refused}"
    return None


def takes_no_codes(then: str) -> bool:
    """Whether a step of kind `then` may follow latents with elements of 16 bits, and none with codes."""
    return refusal(["mla"], then) is None and refusal([CODED], then) is not None


def behind_adapters(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a chain's steps that come behind its last merged adapter; all where no adapter was merged."""
    begun = [number for number, step in enumerate(steps, 1) if step.get("method") not in (*METHODS, None)]
    return steps[max(begun, default=0) :]


def markdown() -> str:
    """The table in Markdown: rows are first steps, columns what follows; reasons are numbered below."""
    reasons: list[str] = []

    def cell(first: str, then: str) -> str:
        row = pair(first, then)
        text, word = (row.refused, "no") if row.exact is None else (row.exact, "yes")
        if text not in reasons:
            reasons.append(text)
        return f"{word} ({reasons.index(text) + 1})"

    lines = [["first \\ then", *KINDS], ["---"] * (len(KINDS) + 1)]
    lines += [[first, *(cell(first, then) for then in KINDS)] for first in FIRSTS]
    cells = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return cells + "\n\n" + "\n".join(f"{n}. {text}." for n, text in enumerate(reasons, 1))
