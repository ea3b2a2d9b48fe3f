"""How models write beside their donor: texts of each, written greedily and sampled, and figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..generation import Options
from ..result_cache import Store, digest
from ..tasks.candidate import Candidate, LazyModel
from ..tasks.harness import OnRows
from . import continuations, greedy_texts
from .continuations import Judged, Text
from .prompts import Asked, Prompt, has_template
from .text_figures import first_difference
from .writing_figures import Divergence, Figures, compared, donor_figures, of_texts, with_nats

BATCH = 20  # prompts together
SEEDS = (0, 1)  # of the donor's sampled texts; a converted model's have the first
TEMPERATURE = 1.0
SEED_STEP = 1009  # between the seeds of a prompt and the next


@dataclass(frozen=True)
class Writer:
    """A model, how it is asked, and where its texts are kept."""

    lazy: LazyModel
    rows: list[list[int]]
    store: Store
    fresh: bool
    on_rows: OnRows

    @property
    def candidate(self) -> Candidate:
        return self.lazy.candidate

    @cached_property
    def tokenizer(self) -> Any:
        return self.candidate.opened.tokenizer()

    def key(self) -> dict[str, Any]:
        """Everything beside prompt and options on which its texts depend."""
        of = self.candidate
        facts = {"model": of.fingerprint, "dtype": str(self.lazy.dtype), "device": of.opened.device}
        return facts | of.cache_key()

    def texts(self, options: Options) -> list[Text]:
        """Its texts; those of a batch are kept as soon as they are written."""
        size = self.candidate.prompts_together(self.candidate.settings.batch_size or BATCH)
        texts: list[Text] = []
        for start in range(0, len(self.rows), size):
            batch = self.rows[start : start + size]
            # Each batch has random numbers of its own, so that errors over prompts are independent.
            drawn = replace(options, seed=options.seed + SEED_STEP * start)
            how = [options.max_new_tokens, options.temperature, drawn.seed]
            key = {"written": digest([batch, how]), **self.key()}
            found = None if self.fresh else self.store.load(key)
            if found is None:
                found = continuations.write(self.lazy.model, batch, drawn)
                self.store.save(key, found)
            texts += found
            manner = f"seed {options.seed}" if options.temperature else "greedy"
            self.on_rows(f"{self.candidate.name}: texts, {manner}", len(texts), len(self.rows))
        return texts


def measure(
    donor: LazyModel,
    others: Sequence[Candidate],
    asked: Asked,
    rows: Sequence[list[list[int]]],
    store: Store,
    *,
    fresh: bool,
    on_rows: OnRows,
) -> dict[str, Any]:
    """The texts' figures, in float32 unless the settings name a dtype; at most two models are in memory.

    Args:
        donor, others: the models; the donor is read anew if it is to have another dtype.
        asked: what they are asked.
        rows: of each model, `prompt_rows` of that.
        store: keeps texts and readings between runs.
        fresh: writes and reads everything anew.
        on_rows: called with the model and what it does, the texts done and the texts in all.

    Returns:
        prompts (the file's name), asked (the prompts), digest (of them), count, max_new_tokens, temperature, seeds,
        dtype; models: `donor_figures` of the first, `compared` of the others, with `greedy_texts` of each.
    """
    dtype, prompts = getattr(torch, donor.candidate.settings.dtype or "float32"), asked.prompts
    options = [Options(asked.max_new_tokens)]
    options += [Options(asked.max_new_tokens, temperature=TEMPERATURE, seed=seed) for seed in SEEDS]
    read = donor if donor.dtype == dtype else LazyModel(donor.candidate, dtype)
    first = Writer(read, rows[0], store, fresh, on_rows)
    writers = [
        Writer(LazyModel(candidate, dtype), of_model, store, fresh, on_rows)
        for candidate, of_model in zip(others, rows[1:], strict=True)
    ]
    greedy, theirs = _of_donor(prompts, first, options)
    models = [donor_figures(**theirs) | {"texts": greedy_texts.plain(first.tokenizer, greedy)}]
    while writers:  # which are let go of, with their models, one after the other
        models.append(_beside(prompts, writers.pop(0), first, options, greedy, theirs))
    return {
        "prompts": asked.source,
        "digest": digest([prompt.text for prompt in prompts]),
        "count": len(prompts),
        "max_new_tokens": asked.max_new_tokens,
        "temperature": TEMPERATURE,
        "seeds": list(SEEDS),
        "dtype": str(dtype).removeprefix("torch."),
        "asked": greedy_texts.asked(prompts),
        "models": models,
    }


def _of_donor(
    prompts: Sequence[Prompt], donor: Writer, options: Sequence[Options]
) -> tuple[list[Text], dict[str, Figures]]:
    """The donor's greedy texts, and the figures of all: greedy, sampled and again, of another seed."""
    names = ("greedy", "sampled", "again")
    texts = {how: donor.texts(each) for how, each in zip(names, options, strict=True)}
    figures = {how: of_texts(prompts, donor.tokenizer, found) for how, found in texts.items()}
    for how in ("sampled", "again"):
        figures[how] = with_nats(figures[how], texts[how], texts[how])
    return texts["greedy"], figures


def _beside(
    prompts: Sequence[Prompt],
    writer: Writer,
    donor: Writer,
    options: Sequence[Options],
    donor_greedy: list[Text],
    theirs: dict[str, Figures],
) -> dict[str, Any]:
    """What `compared` returns of the writer, whose texts are written and read by the donor for it, and the texts."""
    greedy, sampled = map(writer.texts, options[:2])
    judged = judged_texts(writer, donor, sampled)
    ours = {
        "greedy": of_texts(prompts, writer.tokenizer, greedy),
        "sampled": with_nats(of_texts(prompts, writer.tokenizer, sampled), sampled, judged),
    }
    divergences = _divergences(donor, writer, donor_greedy, greedy)
    costs, otherwise = [each["kl"] for each in judged], _asked_otherwise(writer, donor)
    said = greedy_texts.plain(writer.tokenizer, greedy)
    texts = greedy_texts.beside(said, greedy_texts.plain(donor.tokenizer, donor_greedy), divergences)
    return compared(prompts, ours, theirs, costs, divergences, otherwise) | {"texts": texts}


def judged_texts(writer: Writer, donor: Writer, texts: Sequence[Text]) -> list[Judged]:
    """What the donor makes of each text of the writer."""
    found: list[Judged] = []
    for asked, donor_asked, text in zip(writer.rows, donor.rows, texts, strict=True):
        key = {
            "judged": digest([asked, donor_asked, text["tokens"]]),
            "writer": writer.key(),
            "donor": donor.key(),
        }
        judged = None if writer.fresh else writer.store.load(key)
        if judged is None:
            judged = continuations.judge(writer.lazy.model, donor.lazy.model, asked, donor_asked, text)
            writer.store.save(key, judged)
        found.append(judged)
        writer.on_rows(f"{writer.candidate.name}: the donor's reading", len(found), len(texts))
    return found


def _divergences(
    donor: Writer, writer: Writer, theirs: Sequence[Text], ours: Sequence[Text]
) -> list[Divergence]:
    """Where each greedy text of the writer leaves the donor's."""
    found: list[Divergence] = []
    for asked, there, here in zip(donor.rows, theirs, ours, strict=True):
        at = first_difference(here["tokens"], there["tokens"])
        log_prob = None
        if at is not None and at < len(here["tokens"]):
            before, token = [*asked, *here["tokens"][:at]], here["tokens"][at]
            key = {"log_prob": digest([before, token]), **donor.key()}
            log_prob = None if writer.fresh else donor.store.load(key)
            if log_prob is None:
                log_prob = continuations.log_prob(donor.lazy.model, before, token)
                donor.store.save(key, log_prob)
        found.append(Divergence(at, log_prob))
    return found


def _asked_otherwise(writer: Writer, donor: Writer) -> str | None:
    """How the writer's prompts differ from the donor's, in words; None where they are the same tokens."""
    if writer.rows == donor.rows:
        return None
    ours, theirs = (has_template(each.candidate.opened) for each in (writer, donor))
    if theirs and not ours:
        return "has lost its donor's chat template"
    return "makes other tokens of the prompts than its donor: the tokenizer or the chat template is another"
