"""The sections of the page. Each function returns the blocks of one section, or none if the result lacks its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.conversion_tables import healing_line
from ..report.units import count, duration, number, share, size
from ..settings import OWN_CACHE
from .blocks import Block, Cell, Code, Heading, Paragraph, Table
from .figures import curves, layers
from .layer_kinds import layer_kinds
from .task_table import tasks
from .text_table import has_table, text_section
from .verdict import cache_length, cache_shares, cache_tokens, conversions, kind, ratio, title, verdict
from .writing_table import writing

Result = Mapping[str, Any]
Reports = Sequence[Mapping[str, Any]]

FINGERPRINT_DIGITS = 16  # of 64, enough to tell models apart


def blocks(result: Result, reports: Reports, recipe: str | None) -> list[Block]:
    """The blocks of the whole page.

    Args:
        result: of `mhconvert eval`.
        reports: `report.json` of the models after the donor, in their order; the last ones may be missing.
        recipe: YAML.
    """
    page: list[Block] = [Heading(title(result), 1)]
    page += [Paragraph(text, lead=True) for text in verdict(result)]
    page += models(result)
    page += text_section(result)
    page += tasks(result)
    page += retrieval(result)
    page += writing(result)
    page += curves(result)
    page += layer_kinds(result, reports)
    page += layers(result, reports)
    page += healing(result, reports)
    page += cost(result, reports)
    if recipe:
        page += [Heading("Recipe"), Code(recipe)]
    return page + settings(result)


def models(result: Result) -> list[Block]:
    """The table of KV cache, and of few texts perplexity, KL and top-1 agreement, one row for each model."""
    columns, groups = ["model", "KV cache"], [("", 2)]
    texts = () if has_table(result) else result.get("texts") or ()
    for text in texts:
        columns += ["perplexity", "KL", "top-1"]
        groups.append((text["text"], 3))
    rows: list[list[str | Cell]] = []
    for index, (model, kept) in enumerate(zip(result["models"], cache_shares(result), strict=True)):
        row: list[str | Cell] = [
            Cell(model["name"], kind(model)),
            Cell(share(kept), cache_length(result, index)),
        ]
        for text in texts:
            scores, donor = text["models"][index], text["models"][0]
            times = ratio(scores.get("perplexity"), donor.get("perplexity"))
            row.append(Cell(number(scores.get("perplexity")), f"× {times:.3f}" if index and times else ""))
            row += [number(scores.get("kl")) if index else "0", share(scores.get("top1_agreement"))]
        rows.append(row)
    measured = "; ".join(
        f"{text['text']}, {count(text.get('tokens'))} predictions in {count(text.get('sequences'))} rows of "
        f"{count(text.get('sequence_length'))} tokens"
        for text in texts
    )
    note = f"Measured on {measured}. KL is KL(donor ‖ model) in nats a token, top-1 how often both name the same token."
    notes = [Paragraph(note)] if measured else []
    return [Heading("Models"), Table(columns, rows, groups=groups if measured else ()), *notes]


def retrieval(result: Result) -> list[Block]:
    """For each model, a heat map of the recall by context length and depth."""
    probe = result.get("retrieval")
    if not probe:
        return []
    explanation = (
        "A made-up number is hidden in filler text of each length, at each depth, and asked for at the end. A cell "
        f"has the share of numbers recalled exactly, of {probe['trials']}, and below it the nats a token that the "
        "right one cost, which rise before recall fails."
    )
    page: list[Block] = [Heading("Retrieval from long text"), Paragraph(explanation)]
    depths = [f"{100 * depth:g} %" for depth in probe["depths"]]
    if probe.get("left_out"):
        beyond = ", ".join(f"{length:,}" for length in probe["left_out"])
        page.append(Paragraph(f"Left out, being longer than the models read: {beyond} tokens."))
    for model, scores in zip(result["models"], probe["models"], strict=True):
        if not scores:
            continue
        lengths = scores.get("lengths", probe["lengths"])  # fewer for a model with a shorter context window
        rows: list[list[str | Cell]] = [
            [f"{length:,}", *(_heat(*cell) for cell in zip(recalled, nll, strict=True))]
            for length, recalled, nll in zip(lengths, scores["recalled"], scores["nll"], strict=True)
        ]
        caption = _recall_caption(scores)
        page += [
            Heading(model["name"], 3),
            Table(["tokens", *depths], rows, caption, groups=[("", 1), ("depth", len(depths))], kind="heat"),
        ]
    return page


def _recall_caption(scores: Mapping[str, Any]) -> str:
    """The recall and the mean loss over all cells of a heat map."""
    spread = f" ± {100 * scores['share_stderr']:.2g}" if scores.get("share_stderr") is not None else ""
    caption = f"{100 * scores['share']:.3g}{spread} % recalled, {number(scores['mean_nll'])} nats a token"
    absent = scores.get("absent")
    return caption + (f"; {number(absent['nll'])} where the text has no such number" if absent else "")


def _heat(recalled: float, nll: float) -> Cell:
    return Cell(f"{100 * recalled:.0f} %", number(nll), f"heat heat-{round(10 * recalled)}")


def healing(result: Result, reports: Reports) -> list[Block]:
    """For each healed model, how much it was trained."""
    healed = [
        Paragraph(f"{model['name']}: {healing_line(dict(report))}.")
        for model, report in zip(conversions(result), reports, strict=False)
        if report and report.get("healing")
    ]
    return [Heading("Healing"), *healed] if healed else []


def cost(result: Result, reports: Reports) -> list[Block]:
    """The tables of cache size, parameters and active heads, and of decoding speed if it was timed."""
    titles = ["model", "KV elements a token", "of the donor's", "bytes a token", "parameters", "active heads"]
    elements = result.get("cache") or [{}] * len(result["models"])
    rows: list[list[str]] = []
    donors = len(result["models"]) - len(conversions(result))
    for index, (model, kept) in enumerate(zip(result["models"], cache_shares(result), strict=True)):
        own = index - donors  # any report has the donor's numbers
        candidates, side = (reports[own : own + 1], "converted") if own >= 0 else (reports, "donor")
        stored, parameters, heads = (
            next((report[key][side] for report in candidates if (report or {}).get(key)), None)
            for key in ("kv_bytes_per_token", "parameters", "active_heads")
        )
        if model.get("kv_cache_dtype", OWN_CACHE) != OWN_CACHE:
            stored = None  # the report's bytes are of the checkpoint's own cache
        kv_elements = elements[index].get("kv_elements_per_token")
        kv_text = f"{kv_elements:,.10g}" if kv_elements is not None else ""
        rows.append([model["name"], kv_text, share(kept), size(stored), count(parameters), count(heads)])
    used = [at for at in range(len(titles)) if at == 0 or any(row[at] for row in rows)]
    page: list[Block] = []
    if len(used) > 1:
        tokens = cache_tokens(result)
        caption = f"Caches that hold {tokens:,} tokens" if tokens else ""
        page.append(Table([titles[at] for at in used], [[row[at] for at in used] for row in rows], caption))
    page += _speed(result, reports)
    return [Heading("Cache and speed"), *page] if page else []


def _speed(result: Result, reports: Reports) -> list[Block]:
    """The table of decoding speed from the benchmarks in the reports."""
    rows: list[list[str]] = []
    captions = []
    for model, report in zip(conversions(result), reports, strict=False):
        bench = (report or {}).get("bench") or {}
        for row in bench.get("rows") or ():
            donor, converted = (row[side]["decode_tokens_per_s"] for side in ("donor", "converted"))
            rows.append(
                [
                    model["name"],
                    count(row["context"]),
                    f"{donor:,.1f}",
                    f"{converted:,.1f}",
                    f"× {row['ratio']:.3g}",
                ]
            )
        if bench.get("rows"):
            captions.append(f"batch {bench['batch']}, {bench['dtype']}, {bench['device']}")
    titles = ["model", "context", "donor, tokens/s", "this model, tokens/s", ""]
    return [Table(titles, rows, f"Decoding: {'; '.join(dict.fromkeys(captions))}")] if rows else []


def settings(result: Result) -> list[Block]:
    """The settings of the evaluation, the versions of libraries, and the references of the models."""
    given = {key: value for key, value in (result.get("settings") or {}).items() if value is not None}
    entries = {**given, **(result.get("versions") or {})}
    rows = [[key.replace("_", " "), _yes_no(value)] for key, value in entries.items()]
    if result.get("seconds") is not None:
        rows.append(["time", duration(result["seconds"])])
    references = [
        [m["name"], m["reference"], m["dtype"], str(m.get("fingerprint") or "")[:FINGERPRINT_DIGITS]]
        for m in result["models"]
    ]
    columns = ["model", "reference", "dtype", "fingerprint"]
    page: list[Block] = [Heading("Settings and versions"), Table(columns, references, kind="words")]
    return [*page, Table(["", ""], rows, kind="words")] if rows else page


def _yes_no(value: object) -> str:
    """`str(value)`, but "yes" and "no" for booleans."""
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
