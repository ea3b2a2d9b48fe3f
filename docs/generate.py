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
from typing import Any

import typer.main

from mhconvert.cli.main import app
from mhconvert.convert.methods import combinations
from mhconvert.convert.methods.family_table import family_table, markdown
from mhconvert.convert.methods.registry import METHOD_NAMES, settings_class
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.convert.recipe.steps import Step
from mhconvert.convert.validation.option import Declared, declared, expected, settings_in
from mhconvert.eval.settings import EvalSettings
from mhconvert.run.stage_settings import ExportStage, PushStage

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate.py from the code. Edit the declarations there, then run `make docs`. -->\n\n"
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
EVERYWHERE = ("json", "quiet", "debug", "help")  # options of every command, described once


SECTIONS = (
    ("Recipe", Recipe),
    ("`calibration`", Calibration),
    *((f"`settings` of `method: {name}`", settings_class(name)) for name in METHOD_NAMES),
    ("A step of `methods`", Step),
    ("`heal`", HealSettings),
    ("`eval`", EvalSettings),
    ("`export`", ExportStage),
    ("`push`", PushStage),
)


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    return {
        REFERENCE / "cli.md": NOTICE + cli_page(),
        REFERENCE / "options.md": NOTICE + options_page(),
        REFERENCE / "families.md": NOTICE + families_page(),
        REFERENCE / "combinations.md": NOTICE + combinations_page(),
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
    parts = [
        "# Recipe keys and options\n",
        "A [recipe](../recipes.md) is YAML with the keys below. The same names are the fields of the settings classes "
        "in [Python](api.md), and most of them are options of a [command](cli.md). Unknown keys are an error.\n",
    ]
    for heading, kind in SECTIONS:
        parts += [f"## {heading}\n", f"{_prose(kind.__doc__)}\n"]
        rows = [_row(field) for field in declared(kind).values()]
        parts += [_table(("Key", "Type", "Default", "Option", "Meaning"), rows)]
    return "\n".join(parts)


def _row(field: Declared) -> tuple[str, ...]:
    """One key: its name, type, default, option and meaning."""
    inner = settings_in(field.hint)
    default = "required" if field.required else _cell(field.option.default)
    if not default:
        default = _default(None if inner is not None else field.default)
    bounds = " ".join(f"{SIGNS[name]} {bound}" for name, bound in field.option.bounds.items())
    kind = _cell(expected(field.hint, field.option.also)) + (f", {bounds}" if bounds else "")
    flag = f"`{field.flag}`" if field.flag and inner is None else ""
    return f"`{field.name}`", kind, default, flag, _cell(field.option.help)


def families_page() -> str:
    """Which method applies to which model family."""
    return (
        "# Model families\n\n"
        "`mhconvert donors --families` prints this table, and `mhconvert inspect DONOR` says for one model which "
        "methods apply and why others do not.\n\n" + markdown(family_table()) + "\n"
    )


def combinations_page() -> str:
    """Which method may follow which."""
    return (
        "# Methods that combine\n\n"
        "Rows are what made a checkpoint, columns what may be done with it next; [how chains are recorded]"
        "(../chains.md). Where a checkpoint is the work of several steps, each of them is asked.\n\n"
        + combinations.markdown()
        + "\n"
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
    """Help text as a table cell, and the default that the parser shows behind it; several ones stay where they are."""
    bracket = r"\s*\[(?:[^]]*; )?default: ([^]]+?)(?:; [^];]*[<>][^]]*)?\]"
    defaults = re.findall(bracket, text)
    if len(defaults) > 1:
        return _cell(re.sub(bracket, r" Default: `\1`.", text)), None
    plain = re.sub(r"\s*\[(?:default: |required|x>)[^]]*\]", "", text).strip()
    return _cell(plain), defaults[0] if defaults else None


def _default(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return _code(", ".join(f"{name}: {share:g}" for name, share in value.items()))
    if isinstance(value, (list, tuple)):
        return _code(", ".join(map(str, value))) if value else "—"
    return _code(str(value))


def _prose(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (text or "").replace("\b\n", "")).strip()


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
