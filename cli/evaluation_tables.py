"""An evaluation as tables on the terminal."""

from __future__ import annotations

from typing import Any

from ..eval.settings import OWN_CACHE

CODES = "two bytes of codes count as one element of the KV cache; int8 … int2 are weighed behind whole groups of 32"
NOISE = "≈: within two standard errors of the paired difference from the first model, that is, perhaps noise"


def show(result: dict[str, Any], console: Any) -> None:
    """Print the tables that an evaluation has: models and texts, tasks, retrieval, generation, refusals."""
    names = [model["name"] for model in result["models"]]
    for model in result["left_out"]:
        console.out(f"{model['reference']} is left out: {model['why']}", highlight=False)
    if result["texts"]:
        _texts(result, names, console)
    if result["tasks"]:
        _tasks(result, names, console)
    if result["retrieval"]:
        _retrieval(result, names, console)
    if result["generation"]:
        _generation(result, names, console)
    if result["refusals"]:
        _refusals(result, names, console)
    for file in result.get("kept_aside", ()):
        console.out(f"earlier figures, measured in other settings, are kept in {file}", highlight=False)


def _texts(result: dict[str, Any], names: list[str], console: Any) -> None:
    from ..eval.page.text_table import has_table
    from ..eval.page.verdict import cache_length, cache_shares
    from ..eval.report.units import share
    from ..eval.text_spread import sentence

    (_many_texts if has_table(result) else _few_texts)(result, names, console)
    shares = cache_shares(result)
    for index, name in enumerate(names):
        if length := cache_length(result, index):
            console.out(f"{name}: {share(shares[index])} of the KV cache {length}", highlight=False)
    for name, model in zip(names, result.get("over_texts") or (), strict=False):
        if words := sentence(model):
            console.out(f"{name}: {words}", highlight=False)
    if any(model.get("kv_cache_dtype", OWN_CACHE) != OWN_CACHE for model in result["models"]):
        console.out(CODES, highlight=False)


def _many_texts(result: dict[str, Any], names: list[str], console: Any) -> None:
    """A row for each text, and the caches."""
    from ..eval.page.text_table import NOTE, text_rows

    console.out(f"texts: {NOTE}", highlight=False)
    caches = [cache["kv_elements_per_token"] for cache in result["cache"]]
    elements = ["KV elements a token", *(f"{found:,.10g}" for found in caches)]
    console.print(_table(names, [*_joined(text_rows(result)), elements]))


def _few_texts(result: dict[str, Any], names: list[str], console: Any) -> None:
    """A table for each text, with a row for each model."""
    from rich.table import Column, Table

    from ..eval.page.verdict import cache_shares, cache_tokens
    from ..eval.report.units import number, share

    shares, tokens = cache_shares(result), cache_tokens(result)
    for text in result["texts"]:
        title = f"{text['text']}: {text['sequences']} × {text['sequence_length']} tokens"
        console.out(title, highlight=False)
        held = f"KV elements a token{f', at {tokens:,} tokens' if tokens else ''}"
        figures = ("perplexity", "", "KL, nats a token", "top-1 agreement", held)
        table = Table("", *(Column(name, justify="right") for name in figures))
        for index, (name, found, cache) in enumerate(
            zip(names, text["models"], result["cache"], strict=True)
        ):
            elements = cache["kv_elements_per_token"]
            reference = text["models"][0]["perplexity"]
            times = f"× {found['perplexity'] / reference:.3f}" if found is not text["models"][0] else ""
            part = f"{elements:,.10g}" + (f" ({share(shares[index])})" if times else "")
            table.add_row(
                name,
                number(found["perplexity"]),
                times,
                number(found["kl"]),
                share(found["top1_agreement"]),
                part,
            )
        console.print(table)


def _table(names: list[str], rows: list[list[str]]) -> Any:
    """Rows with a name each, and a column for each model."""
    from rich.table import Column, Table

    table = Table("", *(Column(name, justify="right") for name in names))
    for row in rows:
        table.add_row(*row)
    return table


def _joined(rows: list[list[Any]]) -> list[list[str]]:
    """Rows of the page's cells, with their notes in brackets; that of a name after a comma."""
    return [
        [
            f"{label.text}, {label.note}" if label.note else label.text,
            *(f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in cells),
        ]
        for label, *cells in rows
    ]


def _tasks(result: dict[str, Any], names: list[str], console: Any) -> None:
    from rich.table import Column, Table

    from ..eval.report.task_notes import notes
    from ..eval.tasks.scores import is_share

    settings = result["settings"]
    asked = "through the chat template" if settings["chat_template"] else "without a chat template"
    limit = f", the first {settings['limit']} documents of each" if settings["limit"] else ""
    console.out(f"lm-eval {result['versions'].get('lm_eval', '')}, {asked}{limit}", highlight=False)
    table = Table(
        "", "metric", Column("documents", justify="right"), *(Column(name, justify="right") for name in names)
    )
    for row in result["tasks"]:
        shots = f" ({row['num_fewshot']}-shot)" if row["num_fewshot"] else ""
        for index, metric in enumerate(row["metrics"]):
            cells = [_cell(cell, is_share(metric)) for cell in metric["models"]]
            first = (f"{row['task']}{shots}", str(row["samples"])) if index == 0 else ("", "")
            label = metric["metric"] + (f" ({metric['filter']})" if "filter" in metric else "")
            table.add_row(first[0], label, first[1], *cells)
    means = [*([result["average"]] if result["average"] else []), *result.get("apart", ())]
    if means:
        table.add_section()
    for mean in means:
        number = f"{len(mean['tasks'])} task{'s' * (len(mean['tasks']) != 1)}"
        apart = "name" in mean
        label = f"{mean['name']}, apart: mean of {number}" if apart else f"mean of {number}"
        table.add_row(label, "", "", *(_cell(cell, True) for cell in mean["models"]))
    console.print(table)
    for note in [*notes(result), *([NOISE] if len(names) > 1 else ())]:
        console.out(note, highlight=False)


def _cell(cell: dict[str, Any], share: bool) -> str:
    """A value with its standard error, and its difference from the donor: 43.2 ± 2.2 (−1.4 ≈)."""
    if not isinstance(cell["value"], (int, float)):
        return "–"
    scale, digits = (100.0, 1) if share else (1.0, 3)
    text = f"{scale * cell['value']:.{digits}f}"
    if cell["stderr"] is not None:
        text += f" ± {scale * cell['stderr']:.{digits}f}"
    if cell["difference"] is None:
        return text
    return text + f" ({scale * cell['difference']:+.{digits}f}{' ≈' if cell['within_noise'] else ''})"


def _retrieval(result: dict[str, Any], names: list[str], console: Any) -> None:
    from rich.table import Column, Table

    found = result["retrieval"]
    console.out(
        "retrieval: needles found again, by length of the text in tokens and by depth in it", highlight=False
    )
    table = Table(
        "",
        *(Column(str(length), justify="right") for length in found["lengths"]),
        Column("all", justify="right"),
    )
    for name, model in zip(names, found["models"], strict=True):
        shares = [sum(row) / len(row) for row in model["recalled"]]
        table.add_row(name, *(f"{share:.0%}" for share in shares), f"{model['share']:.0%}")
        for depth, recalled in zip(found["depths"], zip(*model["recalled"], strict=True), strict=True):
            cells = (f"{share:.0%}" for share in (*recalled, sum(recalled) / len(recalled)))
            table.add_row(f"  at {100 * depth:g} %", *cells, style="dim")
        table.add_section()
    console.print(table)


def _generation(result: dict[str, Any], names: list[str], console: Any) -> None:
    from ..eval.page.writing_table import figure_rows, title
    from ..eval.writing.verdict import sentence

    found = result["generation"]
    console.out(f"generation: {title(found)}", highlight=False)
    console.print(_table(names, _joined(figure_rows(found))))
    for name, model in list(zip(names, found["models"], strict=True))[1:]:
        console.out(f"{name}: {sentence(model)}", highlight=False)


def _refusals(result: dict[str, Any], names: list[str], console: Any) -> None:
    from rich.table import Column, Table

    found = result["refusals"]
    console.out(f"refusals: of {found['requests']} requests that should be refused", highlight=False)
    table = Table("", Column("refused", justify="right"), Column("difference", justify="right"), "")
    for name, model in zip(names, found["models"], strict=True):
        refused = f"{100 * model['share']:.0f} ± {100 * model['share_stderr']:.0f} %"
        if "difference" not in model:
            table.add_row(name, refused, "", "")
            continue
        moved = f"{100 * model['difference']:+.0f} ± {100 * model['difference_stderr']:.0f}"
        table.add_row(name, refused, moved, "fewer, by more than noise" if model["lowered"] else "")
    console.print(table)
