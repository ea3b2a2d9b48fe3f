"""`--help` in groups, with `--to METHOD` only that method's options; a missing word is told with its choices."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from ...convert.methods.registry import ADAPTERS, METHOD_NAMES
from ...convert.recipe.steps import methods_of
from ...convert.validation.check import shown
from .from_settings import by_parameter, heading_of, joint_help

WORDS = "mhconvert.words"  # in click's context: the words of the command line
NUMBERS = {  # of errors of the validator, by type
    "float_parsing": "a number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "finite_number": "a number",
}
CHAIN = ("--to", "--then")  # the options that name methods
NAMES = "mhconvert.names"  # in a parameter's callback: the words that it accepts


class GroupedCommand(TyperCommand):
    """A command whose callback has `groups` and `of_a_pass` (see `settings_options`)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        if not ctx.resilient_parsing and any(word in ctx.help_option_names for word in args):
            for flag in CHAIN:
                self._require_known_method(ctx, flag, _after(flag, args))
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            names = getattr(getattr(error.param, "callback", None), "__dict__", {}).get(NAMES)
            if names and not error.message:  # it is missing
                error.message = f"Choose one of {', '.join(names)}"
            error.message = _as_in_a_recipe(error)
            raise

    def _require_known_method(self, ctx: Any, flag: str, to: str | None) -> None:
        """Raise BadParameter for a method that there is not: `--help` is done before options are checked."""
        parameter: Any = next((each for each in self.get_params(ctx) if flag in each.opts), None)
        if to is None or to.startswith("-") or parameter is None or parameter.callback is None:
            return
        try:
            parameter.callback(ctx, parameter, to)
        except typer.BadParameter as error:
            error.ctx, error.param = ctx, parameter
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the groups of options."""
        words = ctx.meta.get(WORDS, ())
        named = [name for flag in CHAIN for name in methods_of(_after(flag, words) or "")]
        methods = [name for name in named if name in METHOD_NAMES]
        groups = self._of_callback("groups")
        entries = by_parameter(group for group in groups if not methods or any(map(group.concerns, methods)))
        known, alone = by_parameter(groups).keys(), methods and ADAPTERS.keys() >= set(methods)
        hidden = {*(known - entries.keys()), *(self._of_callback("of_a_pass") if alone else ())}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is None or parameter.name in hidden:
                continue
            if parameter.name in known:
                heading = heading_of(entries[parameter.name])
                record = (record[0], joint_help(entries[parameter.name]))
            elif hidden:
                record = (record[0], _without(hidden, record[1]))
            sections.setdefault(heading, []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] != "Arguments"):
            with formatter.section(heading):
                formatter.write_dl(records)

    def _of_callback(self, name: str) -> tuple[Any, ...]:
        return getattr(self.callback, "__wrapped__", self.callback).__dict__.get(name, ())


def _as_in_a_recipe(error: typer.BadParameter) -> str:
    """Return the error's message; of typer's validator, in the words that refuse the value in a recipe."""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    if found and found[0]["type"] in NUMBERS:
        return f"{shown(found[0]['input'])} is not {NUMBERS[found[0]['type']]}"
    message = str(error.message or "").removeprefix("Value error, ")
    choice = re.fullmatch(r"('.*') is not one of ('.*')\.", message)
    if choice is None:
        return message
    words = choice[2].replace("'", "")
    return f"{choice[1]} is not one of {words}"


def _without(hidden: Collection[str | None], help: str) -> str:
    """Return the help without the parts between semicolons that speak of an option that is hidden."""
    parts = [
        part
        for part in help.split("; ")
        if not {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", part)} & {*hidden}
    ]
    return "; ".join(parts).rstrip(".") + "." if parts and len(parts) < len(help.split("; ")) else help


def _after(flag: str, words: Sequence[str]) -> str | None:
    """The value of `flag` among the words: "--to mla" or "--to=mla"."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
