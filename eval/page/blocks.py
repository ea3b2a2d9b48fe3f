"""The blocks of a page and their rendering in HTML and Markdown. Blocks hold plain text, which is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

EMPTY_CELL = "—"


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: the value.
        note: in small print beside it.
        kind: CSS classes of `style.CSS`, separated by spaces.
    """

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str
    lead: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column is the header of each row.

    Attributes:
        columns: titles.
        groups: (title, number of columns it spans), a second header above the titles.
        strong: indices of highlighted rows.
        folded: in HTML, the summary of a collapsed block around the table; empty for an open table.
        kind: CSS class of the table: "words" for text, "heat" for a heat map.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    groups: Sequence[tuple[str, int]] = ()
    strong: Sequence[int] = field(default=())
    folded: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """An inline SVG of `plots`, the only text that is not escaped. Markdown leaves it out."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Texts:
    """Long texts in a collapsed block. Markdown leaves them out.

    Attributes:
        folded: the summary of the block.
        groups: a title, and of each text below it a name, the part that is another's too, and the rest, of which the
            first word is marked.
    """

    folded: str
    groups: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]


Block = Heading | Paragraph | Table | Figure | Code | Texts


def to_html(block: Block) -> str:
    """The block as HTML."""
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text, lead):
            return f"<p{' class=lead' if lead else ''}>{_escape(text)}</p>"
        case Code(text):
            return f"<pre tabindex=0>{escape(text)}</pre>"
        case Figure(svg, caption):
            return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        case Texts():
            return _html_texts(block)
        case Table():
            table = _html_table(block)
            if not block.folded:
                return table
            return f"<details><summary>{escape(block.folded)}</summary>{table}</details>"


def to_markdown(block: Block) -> str:
    """The block as GitHub's Markdown; empty for a figure, whose numbers are in a table, and for long texts."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape_markdown(text)}"
        case Paragraph(text):
            return _escape_markdown(text)
        case Code(text):
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}yaml\n{text.rstrip()}\n{fence}"
        case Table():
            return _markdown_table(block)
        case Figure() | Texts():
            return ""


def _html_texts(texts: Texts) -> str:
    """The texts as HTML; their lines stay, and control characters become visible."""
    lines = [f"<details><summary>{escape(texts.folded)}</summary>"]
    for title, group in texts.groups:
        lines.append(f"<p class=asked dir=auto>{_escape_text(title)}</p><dl>")
        for name, same, rest in group:
            first = re.findall(r"\A\s*\S*", rest)[0]
            mark = f"<mark>{_escape_text(first)}</mark>" if first else ""
            text = _escape_text(same) + mark + _escape_text(rest[len(first) :])
            lines.append(f"<dt>{escape(name)}</dt><dd dir=auto>{text}</dd>")
        lines.append("</dl>")
    return "\n".join([*lines, "</details>"])


def _escape_text(text: str) -> str:
    """`text` escaped for HTML, with U+FFFD for control characters other than line ends and tabs."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text))


def _html_table(table: Table) -> str:
    """The table as HTML in a box that scrolls sideways."""
    lines = [f"<p class=caption>{_escape(table.caption)}</p>"] if table.caption else []
    kind = f" class={table.kind}" if table.kind else ""
    lines.append(f"<div class=box tabindex=0><table{kind}><thead>")
    if table.groups:
        spans = "".join(f"<th scope=colgroup colspan={n}>{escape(title)}</th>" for title, n in table.groups)
        lines.append(f"<tr class=groups>{spans}</tr>")
    lines.append(
        "<tr>"
        + "".join(f"<th scope=col>{escape(title)}</th>" for title in table.columns)
        + "</tr></thead><tbody>"
    )
    for index, row in enumerate(table.rows):
        strong = " class=strong" if index in table.strong else ""
        lines.append(
            f"<tr{strong}>" + "".join(_html_cell(cell, at == 0) for at, cell in enumerate(row)) + "</tr>"
        )
    return "\n".join([*lines, "</tbody></table></div>"])


def _html_cell(content: str | Cell, first: bool) -> str:
    cell = content if isinstance(content, Cell) else Cell(content)
    note = f"<small>{_escape(cell.note)}</small>" if cell.note else ""
    kind = f' class="{cell.kind}"' if cell.kind else ""
    tag, scope = ("th", " scope=row") if first else ("td", "")
    return f"<{tag}{scope}{kind}>{_escape(cell.text) or EMPTY_CELL}{note}</{tag}>"


def _escape(text: str) -> str:
    """`text` escaped for HTML, with no-break spaces before % and after ±."""
    return escape(text).replace(" %", "\u00a0%").replace("± ", "±\u00a0")


def _markdown_table(table: Table) -> str:
    """The table as Markdown; a group's title is put before the title of each of its columns."""
    groups = [title for title, span in table.groups for _ in range(span)] or [""] * len(table.columns)
    titles = [
        f"{group}: {title}" if group else title for group, title in zip(groups, table.columns, strict=True)
    ]
    lines = [_row(titles), "|---|" + ("---|" if table.kind == "words" else "---:|") * (len(titles) - 1)]
    for index, row in enumerate(table.rows):
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        texts = [
            _escape_markdown((cell.text or EMPTY_CELL) + (f" ({cell.note})" if cell.note else ""))
            for cell in cells
        ]
        lines.append(
            _row([f"**{text}**" for text in texts] if index in table.strong else texts, escaped=True)
        )
    return "\n".join(([_escape_markdown(table.caption), ""] if table.caption else []) + lines)


def _row(texts: Sequence[str], escaped: bool = False) -> str:
    return "| " + " | ".join(text if escaped else _escape_markdown(text) for text in texts) + " |"


def _escape_markdown(text: str) -> str:
    """`text` on one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))
