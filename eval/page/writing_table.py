"""What the models write: the table of its figures, for the page and the terminal, and the section of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..report.units import number, share
from ..writing.verdict import HOW
from .blocks import Block, Cell, Heading, Paragraph, Table, Texts
from .task_table import LEGEND, difference_text, value_text

SHARES = ("distinct_2", "distinct_4", "loops", "ends", "format")  # written in percent
LABELS = {
    "distinct_2": "different pairs of tokens",
    "distinct_4": "different runs of four",
    "longest_loop": "longest loop, tokens",
    "loops": "texts that loop",
    "ends": "end by themselves",
    "tokens": "length, tokens",
    "format": "keep the format",
}
Generation = Mapping[str, Any]  # `generation` of a result of `mhconvert eval`


def writing(result: Mapping[str, Any]) -> list[Block]:
    """The section of the page; empty where generation was not measured."""
    found = result.get("generation")
    if not found:
        return []
    names = [model["name"] for model in result["models"]]
    rows: list[list[str | Cell]] = [list(row) for row in figure_rows(found)]
    note = (
        f"{title(found)}. {LEGEND}, or no more than another seed of the donor differs. KL is KL(model ‖ donor) on the "
        "model's own sampled texts; JSON and Python are parsed, and no code is run."
    )
    page: list[Block] = [Heading("What they write"), Table(["", *names], rows), Paragraph(note)]
    return [*page, *_by(found, names, "kind"), *_by(found, names, "language"), *_texts(found, names)]


def title(found: Generation) -> str:
    """What was written, in a line."""
    prompts = "our" if found["prompts"] == "own" else f"{found['prompts']}'s"
    return (
        f"{prompts} {found['count']} prompts, texts of at most {found['max_new_tokens']} tokens, greedy and sampled at "
        f"temperature {found['temperature']:g}, {found['dtype']}"
    )


def figure_rows(found: Generation) -> list[list[Cell]]:
    """A row for each figure: its name, then a cell for each model, the donor first."""
    others = found["models"][1:]
    rows = [[Cell("the donor's perplexity on sampled texts"), *map(_perplexity, found["models"])]]
    if others:
        rows = [[Cell("KL on sampled texts, nats a token"), Cell("0"), *map(_kl, others)], *rows]
    for label, cell in OF_PAIRS.items() if others else ():
        rows.append([Cell(label), Cell(""), *map(cell, others)])
    for name, label in LABELS.items():
        for how in HOW:
            cells = [_cell(each[how][name], name in SHARES) for each in found["models"]]
            if any(cell.text for cell in cells):
                rows.append([Cell(label, how), *cells])
    return rows


def _kl(model: Generation) -> Cell:
    stderr = model["kl_stderr"]
    return Cell(number(model["kl"]) + (f" ± {stderr:.2g}" if stderr is not None else ""))


def _perplexity(model: Generation) -> Cell:
    """The donor's perplexity, and how many times that on its own texts it is; of the donor on those of another seed."""
    nats = model["sampled"]["nats"]
    seed = "another_seed" in nats
    difference = nats["another_seed" if seed else "difference"]
    if difference is None or not math.isfinite(difference):
        return Cell(number(model["perplexity"]))
    noise = " ≈" if nats.get("within_noise") else ""
    times = f"× {math.exp(difference):.3f}{noise}"
    return Cell(number(model["perplexity"]), f"another seed {times}" if seed else times)


def _divergence(model: Generation) -> Cell:
    found = model["divergence"]
    median = "" if found["tokens"] is None else f"{found['tokens']:g}"
    return Cell(median or "never", f"{share(found['equal'])} the same" if median else "")


OF_PAIRS: dict[str, Callable[[Generation], Cell]] = {  # what only a converted model has
    "tokens until half of them are told apart": lambda model: Cell(str(model["drift_tokens"] or "never")),
    "tokens until greedy texts differ": _divergence,
    "log-probability in the donor of what is then written": lambda model: Cell(
        number(model["divergence"]["log_prob"])
    ),
    "length of sampled texts, times the donor's": lambda model: Cell(number(model["length_ratio"])),
}


def _cell(found: Generation, percent: bool) -> Cell:
    """A figure with its difference from the donor's; of the donor with what another seed changes."""
    text = value_text(found, percent)
    seed = found.get("another_seed")
    if seed is not None:
        return Cell(text, f"another seed {difference_text({'difference': seed}, percent)}")
    return Cell(text, difference_text(found, percent))


def _by(found: Generation, names: Sequence[str], field: str) -> list[Block]:
    """The KL by the prompts' kind or language, folded; empty where they have none or there is no conversion."""
    others = found["models"][1:]
    groups = list(others[0]["kl_by"][field]) if others else []
    rows = [[group, *(number(model["kl_by"][field][group]) for model in others)] for group in groups]
    return [Table([field, *names[1:]], rows, folded=f"KL by {field} of the prompt")] if rows else []


def _texts(found: Generation, names: Sequence[str]) -> list[Block]:
    """The greedy texts after each prompt, the donor's first; empty for results that keep none."""
    donor, *others = (model.get("texts") for model in found["models"])
    if not donor:
        return []
    groups = []
    for at, prompt in enumerate(found["asked"]):
        texts = [_said(name, texts[at]) for name, texts in zip(names[1:], others, strict=True)]
        groups.append((prompt, [(names[0], donor[at]["text"], ""), *texts]))
    return [Texts("Greedy texts, the first word that differs from the donor's marked", groups)]


def _said(name: str, text: Mapping[str, Any]) -> tuple[str, str, str]:
    """A text with its model's name, split where it leaves the donor's."""
    tokens, said, split = text["same_tokens"], text["text"], text["same_characters"]
    same = "the same" if tokens is None else f"the same for {tokens} token{'s' * (tokens != 1)}"
    return f"{name}, {same}", said[:split], said[split:]
