"""The page's parts in their order: each function makes blocks of a result, or none of what it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.conversion_tables import healing_line
from ..report.units import count, duration, number, share, size
from .blocks import Block, Cell, Code, Heading, Paragraph, Table
from .figures import curves, layers
from .task_table import tasks
from .verdict import cache_shares, kind, ratio, title, verdict

Result = Mapping[str, Any]
Reports = Sequence[Mapping[str, Any]]


FINGERPRINT = 16  # of the 64 digits: enough to tell models apart


def blocks(result: Result, reports: Reports, recipe: str | None) -> list[Block]:
    """The whole page. `reports` belong to the models after the donor, in their order, and may be fewer."""
    page: list[Block] = [Heading(title(result), 1)]
    page += [Paragraph(text, lead=True) for text in verdict(result)]
    page += models(result)
    page += tasks(result)
    page += retrieval(result)
    page += curves(result)
    page += layers(result, reports)
    page += healing(result, reports)
    page += cost(result, reports)
    if recipe:
        page += [Heading("Recipe"), Code(recipe)]
    return page + settings(result)


def models(result: Result) -> list[Block]:
    """Cache, perplexity, divergence and agreement, a row for each model."""
    columns, groups = ["model", "KV cache"], [("", 2)]
    for text in result.get("texts") or ():
        columns += ["perplexity", "KL", "top-1"]
        groups.append((text["text"], 3))
    rows: list[list[str | Cell]] = []
    for index, (model, kept) in enumerate(zip(result["models"], cache_shares(result), strict=True)):
        row: list[str | Cell] = [Cell(model["name"], kind(model)), share(kept)]
        for text in result.get("texts") or ():
            found, donor = text["models"][index], text["models"][0]
            times = ratio(found.get("perplexity"), donor.get("perplexity"))
            row.append(Cell(number(found.get("perplexity")), f"× {times:.3f}" if index and times else ""))
            row += [number(found.get("kl")) if index else "0", share(found.get("top1_agreement"))]
        rows.append(row)
    measured = "; ".join(
        f"{text['text']}, {count(text.get('tokens'))} predictions in {count(text.get('sequences'))} rows of "
        f"{count(text.get('sequence_length'))} tokens"
        for text in result.get("texts") or ()
    )
    note = f"Measured on {measured}. KL is KL(donor ‖ model) in nats a token, top-1 how often both name the same token."
    found = [Paragraph(note)] if measured else []
    return [Heading("Models"), Table(columns, rows, groups=groups if measured else ()), *found]


def retrieval(result: Result) -> list[Block]:
    """A heat map of length × depth for each model."""
    found = result.get("retrieval")
    if not found:
        return []
    what = (
        "A made-up number is hidden in filler text of each length, at each depth, and asked for at the end. A cell "
        f"has the share of numbers recalled exactly, of {found['trials']}, and below it the nats a token that the "
        "right one cost, which rise before recall fails."
    )
    page: list[Block] = [Heading("Retrieval from long text"), Paragraph(what)]
    depths = [f"{100 * depth:g} %" for depth in found["depths"]]
    if found.get("left_out"):
        beyond = ", ".join(f"{length:,}" for length in found["left_out"])
        page.append(Paragraph(f"Left out, being longer than the models read: {beyond} tokens."))
    for model, probed in zip(result["models"], found["models"], strict=True):
        if not probed:
            continue
        lengths = probed.get("lengths", found["lengths"])  # a model that reads less has fewer than the donor
        rows: list[list[str | Cell]] = [
            [f"{length:,}", *(_heat(*cell) for cell in zip(recalled, nll, strict=True))]
            for length, recalled, nll in zip(lengths, probed["recalled"], probed["nll"], strict=True)
        ]
        caption = _recall(probed)
        page += [
            Heading(model["name"], 3),
            Table(["tokens", *depths], rows, caption, groups=[("", 1), ("depth", len(depths))], kind="heat"),
        ]
    return page


def _recall(probed: Mapping[str, Any]) -> str:
    spread = f" ± {100 * probed['share_stderr']:.2g}" if probed.get("share_stderr") is not None else ""
    words = f"{100 * probed['share']:.3g}{spread} % recalled, {number(probed['mean_nll'])} nats a token"
    absent = probed.get("absent")
    return words + (f"; {number(absent['nll'])} where the text has no such number" if absent else "")


def _heat(recalled: float, nll: float) -> Cell:
    return Cell(f"{100 * recalled:.0f} %", number(nll), f"heat heat-{round(10 * recalled)}")


def healing(result: Result, reports: Reports) -> list[Block]:
    """How much training each healed model had."""
    healed = [
        Paragraph(f"{model['name']}: {healing_line(dict(report))}.")
        for model, report in zip(result["models"][1:], reports, strict=False)
        if report and report.get("healing")
    ]
    return [Heading("Healing"), *healed] if healed else []


def cost(result: Result, reports: Reports) -> list[Block]:
    """What each model's cache holds, what it computes, and how fast it decodes where that was timed."""
    titles = ["model", "KV elements a token", "of the donor's", "bytes a token", "parameters", "active heads"]
    elements = result.get("cache") or [{}] * len(result["models"])
    rows: list[list[str]] = []
    for index, (model, kept) in enumerate(zip(result["models"], cache_shares(result), strict=True)):
        of_model = reports[index - 1 : index] if index else reports
        side = "converted" if index else "donor"
        stored, parameters, heads = (
            next((report[key][side] for report in of_model if (report or {}).get(key)), None)
            for key in ("kv_bytes_per_token", "parameters", "active_heads")
        )
        held = elements[index].get("kv_elements_per_token")
        whole = f"{held:,.10g}" if held is not None else ""
        rows.append([model["name"], whole, share(kept), size(stored), count(parameters), count(heads)])
    used = [at for at in range(len(titles)) if at == 0 or any(row[at] for row in rows)]
    page: list[Block] = []
    if len(used) > 1:
        page.append(Table([titles[at] for at in used], [[row[at] for at in used] for row in rows]))
    page += _speed(result, reports)
    return [Heading("Cache and speed"), *page] if page else []


def _speed(result: Result, reports: Reports) -> list[Block]:
    rows: list[list[str]] = []
    captions = []
    for model, report in zip(result["models"][1:], reports, strict=False):
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
    """What was measured with what."""
    given = {key: value for key, value in (result.get("settings") or {}).items() if value is not None}
    facts = {**given, **(result.get("versions") or {})}
    rows = [[key.replace("_", " "), _said(value)] for key, value in facts.items()]
    if result.get("seconds") is not None:
        rows.append(["time", duration(result["seconds"])])
    of_models = [
        [m["name"], m["reference"], m["dtype"], str(m.get("fingerprint") or "")[:FINGERPRINT]]
        for m in result["models"]
    ]
    columns = ["model", "reference", "dtype", "fingerprint"]
    page: list[Block] = [Heading("Settings and versions"), Table(columns, of_models, kind="words")]
    return [*page, Table(["", ""], rows, kind="words")] if rows else page


def _said(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
