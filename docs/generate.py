"""Writes the pages of `docs/reference` that follow from the code: the command line, the recipe keys, the families.

python docs/generate.py            write the pages
python docs/generate.py --check    write nothing; exit code 1 where a committed page differs
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer.main

from mhconvert.cli.main import app
from mhconvert.convert.families.table import family_table, markdown
from mhconvert.run.json_schema import schema

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate.py from the code. Edit the declarations there, then run `make docs`. -->\n\n"
EVERYWHERE = ("json", "quiet", "debug", "help")  # options of every command, described once


class Section(NamedTuple):
    """One mapping of a recipe: its heading, the definition in the JSON Schema, the command whose options set it."""

    heading: str
    definition: str | None  # None: the recipe itself
    command: str
    options: dict[
        str, str
    ]  # key of the recipe → parameter of the command, where the two have different names


SECTIONS = (
    Section("Recipe", None, "convert", {"model": "donor", "method": "to", "verify": "no_verify"}),
    Section(
        "`calibration`",
        "Calibration",
        "convert",
        {"sources": "calibration", "tokens": "calibration_tokens"},
    ),
    Section("`settings` of `method: mla`", "MLASettings", "convert", {}),
    Section("`settings` of `method: dha`", "DHASettings", "convert", {}),
    Section("`settings` of `method: moh`", "MoHSettings", "convert", {}),
    Section("`settings` of `method: hydra`", "HydraSettings", "convert", {}),
    Section("`heal`", "HealSettings", "heal", {}),
    Section("`eval`", "EvalStage", "eval", {}),
    Section("`export`", "ExportStage", "export", {}),
    Section("`push`", "PushStage", "push", {"repo": "repo_id"}),
)


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    return {
        REFERENCE / "cli.md": NOTICE + cli_page(),
        REFERENCE / "options.md": NOTICE + options_page(),
        REFERENCE / "families.md": NOTICE + families_page(),
    }


def commands(group: Any = None, name: str = "mhconvert") -> Iterator[tuple[str, Any, Any]]:
    """(name, command, its context) of every command that can be run, groups walked in order."""
    group = group or typer.main.get_command(app)
    context = group.context_class(group, info_name=name)
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command, command.context_class(command, info_name=word, parent=context)


def cli_page() -> str:
    """Every command with its arguments and options."""
    found = list(commands())
    parts = [
        "# Command line\n",
        "`mhconvert DONOR --to METHOD` is short for `mhconvert convert DONOR --to METHOD`. DONOR is an alias "
        "(`mhconvert donors` lists them), a Hub id (`org/name` or `org/name@revision`), a folder with safetensors, "
        "or a `.gguf` file.\n",
        "Exit codes: 0 success, 1 an error that the user can correct (one line on stderr), 2 wrong usage, "
        "130 interrupted with Ctrl-C.\n",
        "## Options of every command\n",
        _table(("Option", "Effect"), _options(found[0][1], found[0][2], only=EVERYWHERE)),
    ]
    for name, command, context in found:
        pieces = " ".join(command.collect_usage_pieces(context))
        parts += [f"## {name}\n", f"{_prose(command.help)}\n", f"```text\n{name} {pieces}\n```\n"]
        arguments = [
            record
            for parameter in command.params
            if parameter.param_type_name == "argument"
            if (record := parameter.get_help_record(context))
        ]
        rows = [(_code(left.split(" <")[0]), _effect(right)[0]) for left, right in arguments]
        parts += [_table(("Argument", "Meaning"), rows)] if rows else []
        options = _options(command, context, skip=EVERYWHERE)
        parts += [_table(("Option", "Effect"), options)] if options else []
    return "\n".join(parts)


def options_page() -> str:
    """Every key that a recipe may have, with its type, default and the option that sets it."""
    whole = schema()
    by_name = {name.removeprefix("mhconvert "): command for name, command, _ in commands()}
    parts = [
        "# Recipe keys and options\n",
        "A [recipe](../recipes.md) is YAML with the keys below. The same names are the fields of the settings classes "
        "in [Python](api.md), and most of them are options of a [command](cli.md). A default of — means that the "
        "value is derived, as the description says. Unknown keys are an error.\n",
    ]
    for heading, definition, word, names in SECTIONS:
        known = whole if definition is None else whole["$defs"][definition]
        parameters = {parameter.name: parameter for parameter in by_name[word].params}
        rows = []
        for key, value in known["properties"].items():
            parameter = parameters.get(names.get(key, key))
            default = "required" if key in known["required"] else _default(value.get("default"))
            described = value.get("description") or (parameter.help if parameter else "")
            rows.append(
                (
                    f"`{key}`",
                    " or ".join(_kinds(value)),
                    default,
                    _flag(parameter),
                    _cell(_sentence(described)),
                )
            )
        parts += [f"## {heading}\n"]
        if definition is not None and known.get("description"):
            parts += [f"{_prose(known['description'])}\n"]
        parts += [_table(("Key", "Type", "Default", "Option", "Meaning"), rows)]
    return "\n".join(parts)


def families_page() -> str:
    """Which method applies to which model family."""
    return (
        "# Model families\n\n"
        "`mhconvert donors --families` prints this table, and `mhconvert inspect DONOR` says for one model which "
        "methods apply and why others do not.\n\n" + markdown(family_table()) + "\n"
    )


def _options(command: Any, context: Any, skip: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> list[Any]:
    rows = []
    for parameter in command.get_params(context):
        if parameter.param_type_name != "option" or parameter.name in skip:
            continue
        if only and parameter.name not in only:
            continue
        left, right = parameter.get_help_record(context)
        effect, default = _effect(right)
        rows.append((_code(left), effect + (f" Default: `{default}`." if default else "")))
    return rows


def _effect(text: str) -> tuple[str, str | None]:
    """Help text as a table cell, and the default that the parser shows behind it."""
    default = re.search(r"\[(?:.*; )?default: ([^;\]]+)[^]]*\]", text)
    plain = re.sub(r"\s*\[(?:default: |required|x>)[^]]*\]", "", text).strip()
    return _cell(plain), default[1] if default else None


def _kinds(value: dict[str, Any]) -> list[str]:
    """The types that a schema's value may have, or the words, each as code."""
    if "$ref" in value:
        return ["`mapping`"]
    if "anyOf" in value:
        return list(
            dict.fromkeys(kind for each in value["anyOf"] for kind in _kinds(each) if kind != "`null`")
        )
    if "enum" in value or "const" in value:
        return [_code(str(word)) for word in value.get("enum", [value.get("const")])]
    kind = value.get("type", "any")
    if kind == "array":
        return ["list of " + " or ".join(_kinds(value.get("items", {})))]
    return [_code({"object": "mapping"}.get(kind, kind))]


def _default(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return _code(", ".join(f"{name}: {share}" for name, share in value.items()))
    if isinstance(value, (list, tuple)):
        return _code(", ".join(map(str, value))) if value else "—"
    return _code(str(value))


def _flag(parameter: Any) -> str:
    """The option, or the name of the argument, that sets a key on the command line."""
    if parameter is None:
        return ""
    return f"`{parameter.opts[0] if parameter.param_type_name == 'option' else parameter.metavar}`"


def _prose(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (text or "").replace("\b\n", "")).strip()


def _sentence(text: str) -> str:
    """A description with a capital at its start, unless that is a value; Python's None is not spoken of."""
    text = re.sub(r"\bNone\b", "if not given", _prose(text))
    return text if re.match(r"\w+:", text) else text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    """Text in a table's cell, where a bar would end the cell."""
    return " ".join(html.escape(text, quote=False).split()).replace("|", "&#124;")


def _code(text: str) -> str:
    """Code in a table's cell; between backticks a bar cannot be written so that every Markdown reads it."""
    return f"<code>{_cell(text)}</code>" if set("|<&") & set(text) else f"`{text}`"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    """Write the pages, or with --check compare them."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not what the code says; run python docs/generate.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
