"""Every score of every head of a donor: `mhconvert inspect --heads`, and what `protect` takes from it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress

from ...convert.calibration.token_rows import require_embedded, sampled_rows
from ...convert.families.facts import attention_facts
from ...convert.open_model import OpenModel, open_model
from ..fidelity import text_rows
from ..needle_text import make_case
from .attention_scores import repetition, retrieval
from .leave_out import Head, Texts, estimated, greedy_set, measured, shape
from .prompts import encoded, requests
from .successors import successors

ROWS, ROW = 8, 128  # of calibration text, and tokens of a row
ROW_SAMPLES, PROMPT_SAMPLES = 8, 8  # tokens drawn from each prediction
NEEDLE_TEXT, DEPTHS, TRIALS = 512, (0.1, 0.5, 0.9), 2
CHECKED = 0.05  # share of the heads, of highest estimates, that are also left out for a measurement
SET = 3  # heads of the greedy set
RETRIEVES = 0.1  # from this score on a head is one that retrieves, as arXiv 2404.15574 has it
OF_REPETITION = ("previous_token", "duplicate_token", "induction")
SEED = 0


@dataclass(frozen=True)
class Asked:
    """What is scored.

    Attributes:
        kinds: of "importance", "retrieval", "repetition", "successor" and "safety".
        prompts: a file of requests; None: the shipped ones.
        text: a file of text for the importance; None: sampled from the donor.
    """

    kinds: tuple[str, ...] = ("importance", "retrieval", "repetition", "successor", "safety")
    prompts: Path | None = None
    text: Path | None = None


def survey(
    reference: str, asked: Asked, device: str | None, trust_remote_code: bool, on_progress: Listener
) -> dict[str, Any]:
    """The scores of the heads of a donor, which is held in memory as a whole.

    Returns:
        layers, heads; scores: name -> (layers, heads) numbers; measured: of the heads that were left out in fact, name
        -> [{layer, head, kl}], highest first; set: [{layer, head, kl}], the greedy set, each KL without it and those
        before; protect: retrieval and safety, each as a file for `--protect`; settings; seconds.

    Raises:
        MhconvertError: a converted checkpoint, or a text or requests that cannot be used.
    """
    started = time.perf_counter()
    opened = open_model(reference, device=device, trust_remote_code=trust_remote_code)
    if opened.donor is None or opened.adapter is not None:
        raise MhconvertError(f"{reference} is no plain donor; name the donor that it was made from")
    attention_facts(opened.config)  # refuses what has no such heads
    wanted = requests(asked.prompts) if "safety" in asked.kinds else []
    prompts = encoded(opened.tokenizer(), wanted, opened.vocab_size)
    for row in prompts:
        opened.require_length(len(row))
    on_progress(Progress("donor", 0, 1, reference))
    model = opened.model()
    model.set_attn_implementation("eager")  # whose weights can be read
    work = Work(opened, model, asked, on_progress)
    found: dict[str, Any] = {"scores": {}, "measured": {}}
    if "retrieval" in asked.kinds:
        found["scores"] |= work.retrieval()
    if "repetition" in asked.kinds:
        kinds = repetition(model, opened.tokenizer(), SEED).unbind(1)
        found["scores"] |= dict(zip(OF_REPETITION, map(Tensor.tolist, kinds), strict=True))
        work.steps("repetition", 1)()
    if "successor" in asked.kinds and (shares := successors(model, opened.tokenizer())) is not None:
        found["scores"]["successor"] = shares.tolist()
        work.steps("successor", 1)()
    if "importance" in asked.kinds:
        work.left_out("importance", Texts(work.rows(), last=False), ROW_SAMPLES, found)
    if "safety" in asked.kinds:
        work.left_out("safety", Texts(prompts, last=True), PROMPT_SAMPLES, found)
    layers, heads = shape(model)
    settings = {"prompts": len(prompts), "rows": ROWS, "row": ROW, "text": str(asked.text or "self")}
    on_progress(Progress("heads", 1, 1))
    found |= {"layers": layers, "heads": heads, "protect": protected(found, layers)}
    return found | {"settings": settings, "seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class Work:
    """A donor in memory, and what is asked of it."""

    opened: OpenModel
    model: Any
    asked: Asked
    on_progress: Listener

    def steps(self, name: str, total: int) -> Callable[[], None]:
        """What is called behind each of `total` steps of the scores `name`, and reports it."""
        done = itertools.count(1)
        return lambda: self.on_progress(Progress("heads", next(done), total, name))

    def retrieval(self) -> dict[str, Any]:
        """retrieval: how often a head looks most at the token to be copied; needle_attention: its attention to it.

        {} where the model reads fewer tokens than such a text has, or cuts a number otherwise behind the question, so
        that it is not copied token by token.
        """
        limit = getattr(self.opened.config, "max_position_embeddings", None) or NEEDLE_TEXT
        if limit < NEEDLE_TEXT:
            return {}
        tokenizer = self.opened.tokenizer()
        cases = [
            make_case(tokenizer, NEEDLE_TEXT, depth, trial=trial)
            for depth, trial in itertools.product(DEPTHS, range(TRIALS))
        ]
        found = retrieval(self.model, cases, self.steps("retrieval", len(cases)))
        if found is None:
            return {}
        most, attention = found.unbind(1)
        return {"retrieval": most.tolist(), "needle_attention": attention.tolist()}

    def rows(self) -> Tensor:
        """(ROWS, ROW) tokens of the text, or sampled from the donor."""
        limit = getattr(self.opened.config, "max_position_embeddings", None) or ROW
        tokenizer, length = self.opened.tokenizer(), min(ROW, limit)
        if self.asked.text is None:
            ids = sampled_rows(self.model, tokenizer, ROWS, length, SEED, self.on_progress)
        else:
            ids = text_rows(tokenizer, self.asked.text, length, ROWS)
        require_embedded(ids, tokenizer, self.opened.vocab_size)
        return ids

    def left_out(self, name: str, texts: Texts, samples: int, found: dict[str, Any]) -> None:
        """Add to `found` the estimates of all heads, the measurements of the highest, and for safety the set."""
        number = math.ceil(CHECKED * math.prod(shape(self.model)))
        grown = (
            min(SET, number) - 1 if name == "safety" else 0
        )  # times that the set is tried with one head more
        on_row = self.steps(name, (2 + grown) * len(texts.rows))
        scores = estimated(self.model, texts, samples, SEED, on_row)
        found["scores"][name] = scores.tolist()
        heads = highest(scores.tolist(), number)
        alone = measured(self.model, texts, [[head] for head in heads], on_row)
        ordered = sorted(zip(heads, alone, strict=True), key=lambda pair: -pair[1])
        found["measured"][name] = _named(ordered)
        if name == "safety":
            found["set"] = _named(greedy_set(self.model, texts, heads, alone, SET, on_row))


def highest(scores: Sequence[Sequence[float]], count: int) -> list[Head]:
    """The (layer, head) of the `count` highest scores, the highest first."""
    every = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    return sorted(every, key=lambda at: -scores[at[0]][at[1]])[:count]


def protected(found: dict[str, Any], layers: int) -> dict[str, Any]:
    """By word, the heads that `--protect` keeps: the share CHECKED of all heads that score highest.

    Of retrieval those from RETRIEVES on; of safety by their measured KL, the set's among them.
    """
    chosen: dict[str, list[Head]] = {}
    scores = found["scores"].get("retrieval")
    if scores is not None:
        best = highest(scores, math.ceil(CHECKED * sum(map(len, scores))))
        chosen["retrieval"] = [(i, h) for i, h in best if scores[i][h] >= RETRIEVES]
    if "safety" in found["measured"]:
        chosen["safety"] = [(each["layer"], each["head"]) for each in found["measured"]["safety"]]
    return {
        word: {
            "from": word,
            "layers": [{"heads": sorted(h for i, h in heads if i == layer)} for layer in range(layers)],
        }
        for word, heads in chosen.items()
    }


def _named(pairs: Sequence[tuple[Head, float]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "head": head, "kl": kl} for (layer, head), kl in pairs]
