"""The `mhconvert` script: the subcommands, and `mhconvert DONOR --to METHOD` as short for `mhconvert convert`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mhconvert.version import __version__

from ..convert.storage.unicode_text import lone_surrogate
from .commands import (
    bench,
    convert,
    curve,
    donors,
    evaluate,
    export,
    generate,
    heal,
    inspect,
    merge,
    push,
    recipes,
    run,
    serve,
)
from .options.grouped_help import GroupedCommand
from .plain_text import one_line
from .process_faults import mend_streams

HELP = """Rewrite the attention of a pretrained language model so that its KV cache shrinks.

\b
  mhconvert smollm2-135m --to mla            convert into ./smollm2-135m-mla
  mhconvert llama3.2-1b --to mla --kv-budget 0.25
                                             keep a quarter of the KV cache
  mhconvert llama3.2-1b --to mla --tolerance kl=0.05
                                             the smallest cache that is this near to the donor
  mhconvert curve smollm2-135m --to mla -o curve.svg
                                             quality against KV budget, several at once
  mhconvert ./my-model --to mla --dry-run    the plan and its costs
  mhconvert heal ./my-model-mla --tokens 20M train it to predict as its donor does
  mhconvert smollm2-135m --to dha+moh        fewer KV heads, and of them those that a token needs
  mhconvert llama3.2-1b --to hydra           an adapter for it that peft trains
  mhconvert merge ./adapter -o OUT           an adapter and its base as a plain checkpoint
  mhconvert ./my-model --to mla --profile portable
                                             a latent of 16-bit elements, as serving kernels read them
  mhconvert export ./my-model-mla --to auto  a form that stock engines load, proven by logits
  mhconvert serve ./my-model-mla             vLLM, llama.cpp or transformers on it
  mhconvert push ./my-model-mla USER/REPO    publish it on the Hugging Face Hub
  mhconvert run smollm2-135m-mla             a whole run by one file: convert, heal, evaluate, export, push
  mhconvert recipes list                     such files, ready to use

DONOR is an alias (mhconvert donors), org/name[@revision], a folder, or a .gguf file.
`mhconvert DONOR --help` shows every option of a conversion."""

app = typer.Typer(
    name="mhconvert",
    help=HELP,
    subcommand_metavar="DONOR --to METHOD | COMMAND [ARGS]...",
    options_metavar="",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert.command,
    "curve": curve.command,
    "heal": heal.command,
    "inspect": inspect.command,
    "eval": evaluate.command,
    "generate": generate.command,
    "bench": bench.command,
    "merge": merge.command,
    "export": export.command,
    "verify": export.verify,
    "serve": serve.command,
    "push": push.command,
    "run": run.command,
    "donors": donors.command,
}
GROUPS: dict[str, typer.Typer] = {"recipes": recipes.app}
for _name, _command in COMMANDS.items():
    app.command(_name, options_metavar="[OPTIONS]", cls=GroupedCommand)(_command)
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mhconvert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def arguments(words: list[str]) -> list[str]:
    """Return the command line with `convert` in front where its first word is no subcommand and so names a donor."""
    if (
        not words
        or words[0] in (*COMMANDS, *GROUPS)
        or (words[0] in ("-h", "--help", "--version") and len(words) == 1)
    ):
        return words
    return ["convert", *words]


def _misspelt(words: list[str]) -> str | None:
    """Return the subcommand that was probably meant by the first word, or None; a file or folder is a donor."""
    if not words or words[0].startswith("-") or "--to" in words or Path(words[0]).exists():
        return None
    return next(iter(difflib.get_close_matches(words[0], [*COMMANDS, *GROUPS], n=1, cutoff=0.7)), None)


def main() -> None:
    """The entry point of the `mhconvert` script."""
    mend_streams()
    words = sys.argv[1:]
    for word in words:
        if (
            fault := lone_surrogate(word)
        ) is not None:  # of bytes that are no UTF-8, which no report could name
            print(one_line(f"mhconvert: the argument {word!r} is not UTF-8 text: {fault}"), file=sys.stderr)
            raise SystemExit(2)
    given = arguments(words)
    meant = _misspelt(words) if given != words else None
    if meant is not None:
        print(f"mhconvert: '{words[0]}' is no subcommand; did you mean 'mhconvert {meant}'?", file=sys.stderr)
        raise SystemExit(2)
    app(args=given, prog_name="mhconvert")


if __name__ == "__main__":
    main()
