"""`--help` in groups; with `--to METHOD`, only the options that the method has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from ...convert.methods.registry import METHOD_NAMES
from .from_settings import by_parameter, heading_of, joint_help

WORDS = "mhconvert.words"  # in click's context: the words of the command line


class GroupedCommand(TyperCommand):
    """A command whose callback has `groups` (see `settings_options`)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the groups of options."""
        to = _after("--to", ctx.meta.get(WORDS, ()))
        groups = [group for group in self._groups() if to not in METHOD_NAMES or group.concerns(str(to))]
        entries, known = by_parameter(groups), by_parameter(self._groups()).keys()
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is None or parameter.name in known - entries.keys():
                continue
            if parameter.name in known:
                heading = heading_of(entries[parameter.name])
                record = (record[0], joint_help(entries[parameter.name]))
            sections.setdefault(heading, []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] != "Arguments"):
            with formatter.section(heading):
                formatter.write_dl(records)

    def _groups(self) -> tuple[Any, ...]:
        return getattr(self.callback, "__wrapped__", self.callback).__dict__.get("groups", ())


def _after(flag: str, words: Sequence[str]) -> str | None:
    """The value of `flag` among the words: "--to mla" or "--to=mla"."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
