"""`mhconvert recipes list|show|validate|schema`: the recipes that ship, and whether a file is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ..options import common
from ..output import Flags, execute

app = typer.Typer(
    help="The recipes that ship with mhconvert, and whether a file is one. A recipe is a YAML file that says a whole "
    "run: convert, heal, evaluate, export, push.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A recipe that ships, or a file.")]
Files = Annotated[list[str], typer.Argument(metavar="FILE…", help="Files, or recipes that ship.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        callback=common.readable_overrides,
        metavar="KEY=VALUE",
        help="As in mhconvert run: heal.tokens=1B. Repeatable.",
    ),
]
SchemaOutput = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it there instead of stdout.")
]


@app.command("list")
def list_command(json: common.Json = False, quiet: common.Quiet = False, debug: common.Debug = False) -> None:
    """List the recipes that ship, with what each of them makes."""

    def work(_: TextIO) -> dict[str, Any]:
        from ...run import shipped_recipes

        return {
            "recipes": [
                dataclasses.asdict(shipped_recipes.entry(shipped_recipes.find(name)))
                for name in shipped_recipes.names()
            ]
        }

    execute(Flags(json, quiet, debug), work, _show_list)


@app.command("show")
def show_command(
    name: Name, json: common.Json = False, quiet: common.Quiet = False, debug: common.Debug = False
) -> None:
    """Print a recipe's file, comments included; to change it, write it to a file of your own."""

    def work(_: TextIO) -> dict[str, Any]:
        from ...run import shipped_recipes
        from ...run.whole_recipe import load

        path = shipped_recipes.find(name)
        return {"recipe": load(path).to_dict(), "text": path.read_text(encoding="utf-8")}

    execute(Flags(json, quiet, debug), work, _show_text)


@app.command("validate")
def validate_command(
    files: Files,
    overrides: Overrides = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Say of each file whether it is a recipe and what it would do; exit 1 where one of them is not. Needs no model."""

    def work(_: TextIO) -> dict[str, Any]:
        return {"recipes": [_validated(name, overrides or []) for name in files]}

    execute(Flags(json, quiet, debug), work, _show_validated, faults=_faults)


@app.command("schema")
def schema_command(
    output: SchemaOutput = None, quiet: common.Quiet = False, debug: common.Debug = False
) -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check one."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert.errors import OutputError

        from ...run.json_schema import schema

        found = schema()
        if output is not None:
            try:
                output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            except OSError as error:
                raise OutputError(f"{output} cannot be written: {error.strerror}") from error
        return {"output": output, "schema": found}

    execute(Flags(False, quiet, debug), work, _show_schema)


def _validated(name: str, overrides: list[str]) -> dict[str, Any]:
    from mhconvert.errors import MhconvertError

    from ...run import shipped_recipes
    from ...run.whole_recipe import load

    try:
        recipe = load(shipped_recipes.find(name), overrides)
    except MhconvertError as error:
        return {"file": name, "valid": False, "error": " ".join(str(error).split())}
    return {"file": name, "valid": True, "stages": list(recipe.stages), "does": recipe.summary()}


def _faults(result: dict[str, Any]) -> list[str]:
    return [found["error"] for found in result["recipes"] if not found["valid"]]


def _show_validated(result: dict[str, Any], console: Any) -> None:
    for found in result["recipes"]:
        if found["valid"]:
            console.out(f"{found['file']}: valid: {found['does']}", highlight=False)


def _show_text(result: dict[str, Any], console: Any) -> None:
    console.out(result["text"], end="", highlight=False)


def _show_list(result: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("recipe", "model", "method", "settings", "stages"):
        table.add_column(heading, no_wrap=heading in ("recipe", "model", "method"))
    for found in result["recipes"]:
        settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
        table.add_row(found["name"], found["model"], found["method"], settings, ", ".join(found["stages"]))
    console.print(table)


def _show_schema(result: dict[str, Any], console: Any) -> None:
    if result["output"] is None:
        console.out(json.dumps(result["schema"], indent=2, ensure_ascii=False), highlight=False)
    else:
        console.out(result["output"], highlight=False)
